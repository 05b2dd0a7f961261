"""A load generator for servers with OpenAI's HTTP API or Baton's gRPC API.

    options       what is sent, how it arrives, which targets hold
    workload      conversations to send: made up from lengths, of a trace, of a file
    conversation_files   prompts and lengths of conversations as JSON lines
    prompt_text   texts of a wanted number of tokens, equal where prefixes are to be equal
    target        what a server is to the generator
    http_wire     HTTP/1.1 on asyncio's own protocols, with the time of each read
    sse           server-sent events, and what OpenAI's events say
    openai_target, grpc_target   the two kinds of server
    calibration   is it there, does it serve the model, how many tokens is a word
    pacing, runner   open and closed loops
    outcome       what one request got
    figures       percentiles, rates and goodput of a run
    timeline      the run over time
    svg_plots, html_report, json_report   how it is told

Knows nothing of how the server works; figures are those of its clients.
"""
