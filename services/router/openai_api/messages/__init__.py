"""Anthropic's Messages API, as a translation onto the chat route.

message_schema       what a body may hold
message_conversation its messages as those of a chat
message_format       events of a stream, and whole answers
message_errors       errors in this API's shape
message_routes       the routes
"""
