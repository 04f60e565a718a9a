"""`POST /predict`."""

import time

from anyio import to_thread
from fastapi import APIRouter, Depends, Request, Response

from app.bodies import JSON, documented, read_json
from app.dependencies import ServiceOf, same_feature_space
from app.prediction import predict
from app.schemas import PredictRequest

router = APIRouter(tags=["predict"], dependencies=[Depends(same_feature_space)])
_HINT = (
    ": send fewer rows in each request, or the binary form (the Open Inference Protocol's binary tensors) where "
    "the service has it"
)


@router.post("/predict", openapi_extra=documented({JSON: PredictRequest}))
async def post_predict(request: Request, service: ServiceOf) -> Response:
    """Apply an adapter to rows, or to each row its own; `null` is the bare base layer."""
    body = await read_json(request, max_bytes=service.settings.max_predict_json_bytes, hint=_HINT)
    # Threads of its own: uploads that wait for the disk must not hold up an answer.
    answer = await to_thread.run_sync(predict, service, body, time.perf_counter(), limiter=service.predict_threads)
    timing = f"queue;dur={answer.queue_seconds * 1e3:.3f}, forward;dur={answer.forward_seconds * 1e3:.3f}"
    return Response(answer.body, media_type=JSON, headers={"Server-Timing": timing})
