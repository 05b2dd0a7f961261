"""POST /tokenize and POST /detokenize, in the shapes that vLLM and its bench know."""

from __future__ import annotations

from baton.core.errors import InvalidRequest
from services.router.edge.edge_config import EdgeConfig
from services.router.edge.preprocess import Preprocessor, check_token_ids, describe
from services.router.openai_api.exchange import Exchange
from services.router.openai_api.prompts import chat_options, plain_messages
from services.router.openai_api.schema import DetokenizeBody, TokenizeBody, parse_body
from services.router.openai_api.tool_plan import tool_definitions
from services.router.requests.generation import ModelCard
from services.router.tenants.tenants import Tenants


class TokenRoutes:
    """Nothing is generated, so no quota is touched."""

    def __init__(self, preprocessor: Preprocessor, config: EdgeConfig, tenants: Tenants) -> None:
        self._preprocessor = preprocessor
        self._config = config
        self._tenants = tenants

    async def tokenize(self, exchange: Exchange) -> None:
        await self._tenants.caller(exchange.text_header)
        body = parse_body(await self._read(exchange), TokenizeBody)
        card = self._preprocessor.model_card(body.model)
        ids = await self._ids(body, card)
        texts = None
        if body.return_token_strs:
            texts = [card.tokenizer.token_text(token_id) for token_id in ids]
        await exchange.answer_json(
            200,
            {
                "count": len(ids),
                "max_model_len": card.max_model_len,
                "tokens": ids,
                "token_strs": texts,
            },
        )

    async def detokenize(self, exchange: Exchange) -> None:
        await self._tenants.caller(exchange.text_header)
        body = parse_body(await self._read(exchange), DetokenizeBody)
        card = self._preprocessor.model_card(body.model)
        if not isinstance(body.tokens, list):
            raise InvalidRequest(
                f"tokens must be a list of token ids, got {describe(body.tokens)}", param="tokens"
            )
        ids = check_token_ids(card, body.tokens, "tokens")
        text = await self._preprocessor.run(
            lambda: card.tokenizer.decode(ids, skip_special_tokens=False)
        )
        await exchange.answer_json(200, {"prompt": text})

    async def _ids(self, body: TokenizeBody, card: ModelCard) -> tuple[int, ...]:
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("send prompt or messages, one of the two", param="prompt")
        if body.messages is not None:
            tools = tool_definitions(body.tools or ())
            messages = plain_messages(body.messages)
            options = chat_options(body, tools)
            return await self._preprocessor.chat_prompt(
                card, messages, options, add_special_tokens=bool(body.add_special_tokens)
            )
        if not body.prompt:
            return ()
        return await self._preprocessor.text_prompt(
            card, body.prompt, add_special_tokens=body.add_special_tokens is not False
        )

    async def _read(self, exchange: Exchange) -> bytes:
        return await exchange.body(
            self._config.max_body_bytes, timeout_s=self._config.body_timeout_s
        )
