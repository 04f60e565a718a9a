"""Which settings go with which method and loss."""

from collections.abc import Mapping

from adapters.errors import IgnoredField, InvalidCombination, MissingField
from adapters.training.settings import Loss, Method
from app.training.schemas import TrainingBody, is_auto

OF_GRADIENTS = (
    "epochs",
    "learning_rate",
    "batch_size",
    "init",
    "weight_decay",
    "momentum",
    "clip_norm",
    "schedule",
    "warmup_steps",
    "early_stopping",
    "max_steps",
    "max_seconds",
)
"""What only gradient descent uses."""
_OF_THE_CLOSED_FORM = ("ridge", "prior", "keep_statistics")
IGNORED: Mapping[Method, tuple[str, ...]] = {
    Method.CLOSED_FORM: OF_GRADIENTS,
    Method.ADAMW: (*_OF_THE_CLOSED_FORM, "momentum"),
    Method.SGD: _OF_THE_CLOSED_FORM,
}
"""Fields that a method has no use for: giving one is a mistake, and said so."""
_OF_LOSSES = {
    "huber_delta": (Loss.HUBER,),
    "label_smoothing": (Loss.CROSS_ENTROPY,),
    "class_weights": (Loss.CROSS_ENTROPY,),
    "temperature": (Loss.MULTIPLE_NEGATIVES,),
}


def check_settings(training: TrainingBody) -> Method | None:
    """The method, or None where it is open; raises `IgnoredField` or `InvalidCombination`."""
    loss = Loss(training.loss)
    for name, losses in _OF_LOSSES.items():
        if training.gave(name) and loss not in losses:
            refuse(name, training, f"with {loss}")
    method = None if is_auto(training.method) else Method(training.method)
    if method is Method.CLOSED_FORM and loss is not Loss.MSE:
        raise InvalidCombination(
            f"closed_form minimises squared error, which has an exact solution; {loss} has none: use adamw or sgd",
            field="training.loss",
            given=training.loss,
            expected="mse with closed_form",
        )
    for name in IGNORED[method] if method is not None else ():
        if training.gave(name):
            refuse(name, training, f"with {method}")
    if loss is Loss.MULTIPLE_NEGATIVES and not training.gave("batch_size"):
        raise MissingField(
            "multiple_negatives takes the negatives from the row's batch: say how large it is",
            field="training.batch_size",
            expected="a batch_size, or auto",
        )
    return method


def refuse(name: str, training: TrainingBody, why: str) -> None:
    """Raises `IgnoredField` for a setting that has no effect."""
    raise IgnoredField(
        f"training.{name} has no effect {why}: leave it out",
        field=f"training.{name}",
        given=getattr(training, name) if not hasattr(getattr(training, name), "model_dump") else None,
        expected=f"{name} left out {why}",
    )
