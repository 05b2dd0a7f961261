"""The OpenAI-compatible API: what bodies mean, and the HTTP routes as plain ASGI.

    exchange           one HTTP request and its response: headers, body with a limit, JSON answers
    error_body         an exception as the JSON object clients expect
    schema             what a body may hold (pydantic) and what is not supported
    openapi            the document that says so
    prompts            bodies to messages and prompts
    sampling           body fields to SamplingParams
    structured         response_format and its kin to a form of output
    tool_plan          what a request says of tools
    tools              parsers of tool calls, one a family of models
    jobs               a parsed body to the generations that answer it, for HTTP and gRPC
    feed               several generations of one request read as one, cancelled as one
    wire_format        what the formats of both routes share
    chat_format, completion_format
                       chunks and answers of a route
    logprobs           token log-probabilities in all shapes
    serving            run the generations of a request and stream or collect them
    handlers           the two generation routes
    as_chat, blocks    what other APIs need to be translated: bodies there, outputs back
    responses, messages
                       OpenAI's Responses and Anthropic's Messages, as such translations
    token_routes       tokenize and detokenize

Knows nothing of placement, workers or KV; it sees the dispatcher as `generation.Generator`.
"""
