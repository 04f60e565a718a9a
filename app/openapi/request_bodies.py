"""Bodies that are no JSON, as the document describes them."""

from typing import Annotated

from pydantic import BaseModel, Field, WithJsonSchema

File = Annotated[bytes, WithJsonSchema({"type": "string", "format": "binary"})]


class PeftFiles(BaseModel):
    """The two files that PEFT's `save_pretrained` writes: known by their file names, whatever the fields are called."""

    adapter_model: File = Field(description="`adapter_model.safetensors`")
    adapter_config: File = Field(description="`adapter_config.json`")
