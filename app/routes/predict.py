"""`POST /predict`."""

import time

from fastapi import APIRouter, Depends, Request, Response
from starlette.concurrency import run_in_threadpool

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
    received = time.perf_counter()
    body = await read_json(request, max_bytes=service.settings.max_predict_json_bytes, hint=_HINT)
    answer = await run_in_threadpool(predict, service, body, received)
    timing = f"queue;dur={answer.queue_seconds * 1e3:.3f}, forward;dur={answer.forward_seconds * 1e3:.3f}"
    return Response(answer.body, media_type=JSON, headers={"Server-Timing": timing})
