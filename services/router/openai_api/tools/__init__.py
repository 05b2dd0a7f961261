"""Tool calls: what a request says of tools, and how the calls are found in what a model writes.

    tool_events    what a parser finds: text, calls, arguments
    text_gate      text up to a marker, with nothing shown that may belong to one
    json_scanner   a JSON object followed character by character, a call in such an object
    hermes, llama3_json, mistral, pythonic, deepseek, qwen_xml
                   one family of models each
    forced         calls that a grammar has enforced
    families       which family a chat template is of
    spelled_out    tools in the words of a system message, for templates that know none

Pure: no requests, no wire formats. A parser's result does not depend on how its text was cut.
"""
