"""Chats of 8 tokens, whole and streamed, as fast as they are answered."""

import os

from locust import HttpUser, task


class Chatter(HttpUser):
    def _body(self, stream: bool) -> dict:
        messages = [{"role": "user", "content": "Name a colour."}]
        return {
            "model": os.environ["MODEL"],
            "messages": messages,
            "max_tokens": 8,
            "ignore_eos": True,
            "stream": stream,
        }

    @task
    def whole(self) -> None:
        with self.client.post(
            "/v1/chat/completions", json=self._body(False), catch_response=True
        ) as response:
            if response.json()["usage"]["completion_tokens"] != 8:
                response.failure("not 8 tokens")

    @task
    def streamed(self) -> None:
        with self.client.post(
            "/v1/chat/completions", json=self._body(True), stream=True, catch_response=True
        ) as response:
            lines = [line for line in response.iter_lines() if line]
            if lines[-1] != b"data: [DONE]":
                response.failure("no end of the stream")
