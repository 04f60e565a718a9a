"""The OpenAPI document: what FastAPI cannot know of calls that read their own bodies, put beside what it can."""
