"""Which problems each operation can end in: what follows from its form, and what is its own."""

from collections.abc import Iterable, Mapping
from typing import Any

_REFERENCE = ("invalid_reference", "adapter_not_found", "version_not_found", "alias_not_found", "adapter_not_live")
_USED = (*_REFERENCE, "base_mismatch", "feature_space_mismatch")
_READS = ("catalog_busy", "storage_failed", "too_many_open_files")
_WRITES = (*_READS, "storage_full")
_JSON = ("not_json", "duplicate_key", "missing_field", "unknown_field", "wrong_type", "out_of_range", "not_finite")
_ROWS = ("dataset_not_found", "version_not_found", "invalid_reference", "wrong_shape", "bad_rows")
_TRAINS = ("ignored_field", "invalid_combination", "estimate_too_large", "queue_full", *_ROWS, *_WRITES, *_USED)
_ANSWERS = (
    *(*_USED, "wrong_shape", "invalid_combination", "output_not_finite"),
    *("queue_full", "request_timeout", "not_ready", "blob_corrupt", *_READS),
)
_FILES = ("invalid_upload", "invalid_safetensors", "invalid_archive", "peft_unsupported", "rank_too_large")
_MODEL = ("adapter_not_found", "version_not_found", "adapter_not_live", "invalid_name", "base_mismatch", *_READS)
_INFER = (*_MODEL, *_ANSWERS)

OWN: Mapping[str, Iterable[str]] = {
    "predict": ("invalid_name", *_ANSWERS),
    "train_adapter": (*_TRAINS, "rank_too_large", "invalid_name", "request_timeout", "blob_corrupt"),
    "upload_adapter": (*_FILES, "wrong_shape", "request_timeout", *_WRITES),
    "list_adapters": ("invalid_name", *_READS),
    "show_adapter": ("adapter_not_found", *_READS),
    "list_adapter_versions": ("adapter_not_found", *_READS),
    "show_adapter_version": ("adapter_not_found", "version_not_found", "wrong_type", *_READS),
    "download_adapter": (
        *("adapter_not_found", "version_not_found", "adapter_not_live", "invalid_input", "blob_corrupt"),
        *_READS,
    ),
    "set_live": ("adapter_not_found", "version_not_found", "request_timeout", *_WRITES),
    "update_adapter": (*_TRAINS, "no_statistics", "conflict", "request_timeout", "blob_corrupt"),
    "delete_adapter": ("adapter_not_found", *_WRITES),
    "upload_dataset": ("invalid_dataset", "invalid_archive", "not_json", "duplicate_key", *_WRITES),
    "list_datasets": ("invalid_name", *_READS),
    "show_dataset": ("dataset_not_found", *_READS),
    "list_dataset_versions": ("dataset_not_found", *_READS),
    "show_dataset_version": ("dataset_not_found", "version_not_found", "wrong_type", *_READS),
    "preview_dataset": ("dataset_not_found", "version_not_found", "blob_corrupt", *_READS),
    "delete_dataset": ("dataset_not_found", *_WRITES),
    "list_jobs": ("invalid_name", *_READS),
    "show_job": ("job_not_found", *_READS),
    "list_job_adapters": ("job_not_found", *_READS),
    "watch_job": ("job_not_found", "queue_full", *_READS),
    "cancel_job": ("job_not_found", "job_ended", *_WRITES),
    "revert_job": ("job_not_found", "job_not_ended", *_WRITES),
    "show_base": (),
    "check_alive": (),
    "check_ready": ("not_ready", *_READS),
    "show_metrics": (),
    "show_server": (),
    "server_live": (),
    "server_ready": ("not_ready", *_READS),
    "show_model": _MODEL,
    "show_model_version": _MODEL,
    "show_model_configuration": _MODEL,
    "show_model_version_configuration": _MODEL,
    "model_ready": _MODEL,
    "model_version_ready": _MODEL,
    "infer": _INFER,
    "infer_version": _INFER,
    "list_models": _READS,
    "filter_models": _READS,
}


def codes(operation: Mapping[str, Any]) -> set[str]:
    """All of an operation of the document, whose parameters and bodies are complete."""
    found = {"internal_error", "head_too_large", "not_http", "too_many_open_files", *OWN[operation["operationId"]]}
    parameters = {parameter.get("name", parameter.get("$ref")) for parameter in operation["parameters"]}
    found |= {"feature_space_mismatch"} if "#/components/parameters/FeatureSpace" in parameters else set()
    found |= {"precondition_failed"} if "#/components/parameters/IfMatch" in parameters else set()
    found |= {"wrong_type", "out_of_range"} if "#/components/parameters/RequestTimeout" in parameters else set()
    found |= {"invalid_cursor"} if "cursor" in parameters else set()
    found |= {"invalid_name"} if "name" in parameters else set()
    if any(parameter.get("in") == "query" for parameter in operation["parameters"]):
        found |= {"unknown_field", "wrong_type", "out_of_range", "invalid_combination"}
    if "requestBody" in operation:
        found |= {"body_too_large"}
        found |= {"too_many_bytes"} if operation["operationId"] != "upload_dataset" else set()
        found |= {"unsupported_media_type"} if operation["requestBody"]["required"] else set()
        found |= set(_JSON) if "application/json" in operation["requestBody"]["content"] else set()
    return found
