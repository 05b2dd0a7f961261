"""The OpenAI-compatible HTTP API as plain ASGI.

    exchange      one HTTP request and its response: headers, body with a limit, JSON answers
    error_body    an exception as the JSON object clients expect
    schema        what a body may hold (pydantic) and what is not supported
    prompts       bodies to messages and prompts
    sampling      body fields to SamplingParams
    feed          several generations of one request read as one, cancelled as one
    wire_format   chunks and answers of the chat and completions routes
    logprobs      token log-probabilities in both routes' shapes
    serving       run the generations of a request and stream or collect them
    handlers      the two generation routes

Knows nothing of placement, workers or KV; it sees the dispatcher as `generation.Generator`.
"""
