"""Predictions of the asynchronous client: texts through the encoder, and rows in as few requests as possible."""

# N rows · I in_features
import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex import inference
from loraplex._async.connection import AsyncConnection
from loraplex.arrays import Encode, Float32, Rows, encode_rows, is_text, rows_of
from loraplex.errors import BadAnswer, InvalidInput, LoraplexError, OutOfRange

# Statuses that stand for several codes: an answer under `/v2` gives the code only in words.
# 500 and 503 are not among them: a service in trouble is not sent the same request again. They raise `InternalError`
# and `NotReady`.
_AMBIGUOUS = (404, 409, 422)


async def read_rows(inputs: Any, encode: Encode | None, *, field: str = "inputs") -> Rows:
    """Return rows from numbers, or from texts by the encoder."""
    if not is_text(inputs):
        return rows_of(inputs, field=field)
    return await asyncio.to_thread(encode_rows, inputs, encode, field=field)


@dataclass(frozen=True, slots=True, kw_only=True)
class AsyncPredictor:
    """Predicts or classifies more rows than the service accepts in one request.

    An alias may change between two requests. Every request after the first therefore names the version that answered
    before.
    """

    connection: AsyncConnection
    by_row: bool
    """True if each row has its own adapter."""
    options: Mapping[str, object]
    """Fields of the request that ask for classes; empty for outputs."""
    timeout: float | None

    async def predict(self, references: Sequence[str | None], x_NI: Float32) -> list[inference.Part]:
        """Return the answers to all rows, each with its reference, in as few requests as possible."""
        as_json = self.by_row or bool(self.options) or inference.model_path(references[0]) is None
        try:
            return await self._send_all(references, x_NI, as_json=as_json)
        except InvalidInput as error:
            # The service answers `out_of_range` for too many rows; the base class stands for an unknown code.
            if type(error) not in (InvalidInput, OutOfRange):
                raise
            config = "/v2/models/__base__/config"
            max_rows = await self.connection.get(config, lambda value: int(value["max_batch_size"]))
            if max_rows >= min(inference.MAX_ROWS, len(x_NI)):
                raise
        return await self._send_all(references, x_NI, as_json=as_json, max_rows=max_rows)

    async def _send_all(
        self, references: Sequence[str | None], x_NI: Float32, *, as_json: bool, max_rows: int = inference.MAX_ROWS
    ) -> list[inference.Part]:
        send = self._send_json if as_json else self._send_binary
        pins: dict[str | None, str] = {}
        parts = []
        for cut in inference.slices(*x_NI.shape, max_rows=max_rows, as_json=as_json):
            row_references = references[cut]
            try:
                part = await send([pins.get(reference, reference) for reference in row_references], x_NI[cut])
            except LoraplexError as error:
                inference.count_from(error, cut.start)
                raise
            if not len(row_references) == len(part.values) == len(part.versions_N):
                detail = f"the answer to {len(row_references)} rows has another number of rows"
                raise BadAnswer(detail, expected="an output for each row")
            for reference, version in dict(zip(row_references, part.versions_N, strict=True)).items():
                if version is not None:
                    pins.setdefault(reference, str(version))
            parts.append(part)
        return parts

    async def _send_binary(self, references: Sequence[str | None], x_NI: Float32) -> inference.Part:
        where = inference.model_path(references[0])
        assert where is not None
        try:
            call = inference.binary_call(where, x_NI, timeout=self.timeout)
            return inference.read_binary(await self.connection.send(call))
        except LoraplexError as error:
            if error.status not in _AMBIGUOUS:
                raise
            # The same rows in JSON are answered with the code.
            try:
                await self._send_all(references, x_NI, as_json=True)
            except LoraplexError as precise:
                if precise.status == error.status:
                    raise precise from None
            raise

    async def _send_json(self, references: Sequence[str | None], x_NI: Float32) -> inference.Part:
        call = inference.json_call(references, x_NI, by_row=self.by_row, options=self.options, timeout=self.timeout)
        return inference.read_json(await self.connection.send(call), has_labels=bool(self.options))
