"""Open Inference Protocol: models, infer requests and their answers below `/v2`. Read `routes` first."""
