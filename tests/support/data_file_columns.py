"""Tensors of a training as the columns of its data file."""

from dataclasses import fields

from adapters.training.data_file import Column, TrainingData


def columns_of(data: TrainingData) -> dict[str, Column]:
    """Return a column for each tensor that the data have."""
    tensors = {field.name: getattr(data, field.name) for field in fields(data)}
    return {name: Column.of(tensor.numpy()) for name, tensor in tensors.items() if tensor is not None}
