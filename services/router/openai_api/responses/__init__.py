"""OpenAI's Responses API, as a translation onto the chat route.

response_schema    what a body may hold
conversation       its input as chat messages, and an answer as the messages that follow
envelope           the object `response`, in every state
response_format    events of a stream, and whole answers
store              answers that can be fetched and continued
response_routes    the routes
"""
