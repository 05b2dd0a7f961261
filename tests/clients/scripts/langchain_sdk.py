"""langchain-openai: langchain_sdk.py URL MODEL."""

import asyncio
import json
import sys

from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

url, model = sys.argv[1] + "/v1", sys.argv[2]
QUESTION = "Which city is the capital of France?"
given = {"base_url": url, "api_key": "none", "model": model, "temperature": 0, "max_tokens": 12}
told = {}
chat = ChatOpenAI(**given)
answer = chat.invoke(QUESTION)
told["text"] = answer.content
told["usage"] = answer.usage_metadata["output_tokens"]
told["streamed"] = "".join(chunk.content for chunk in chat.stream(QUESTION))
told["batch"] = [a.content for a in chat.batch([QUESTION] * 3)]
told["async"] = asyncio.run(chat.ainvoke(QUESTION)).content
chain = ChatPromptTemplate.from_messages([("system", "Be brief."), ("user", "{q}")]) | chat
told["chain"] = chain.invoke({"q": QUESTION}).content
told["completion"] = OpenAI(**given).invoke("The sky is")
json.dump(told, sys.stdout)
