"""langchain-openai against a server: URL, model's id. Prints what it got as JSON."""

import json
import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

url, name = sys.argv[1:]
rest = {"base_url": f"{url}/v1", "api_key": "none", "model": name, "temperature": 0, "max_tokens": 12, "max_retries": 0}
chat = ChatOpenAI(**rest)  # type: ignore[arg-type]
messages = [SystemMessage("Go on."), HumanMessage("the plot")]
whole = chat.invoke(messages)
pieces = list(chat.stream(messages, stream_usage=True))
print(
    "REPORT "
    + json.dumps(
        {
            "text": whole.content,
            "stream": "".join(str(piece.content) for piece in pieces),
            "usage": whole.usage_metadata,
            "stream usage": next(piece.usage_metadata for piece in reversed(pieces) if piece.usage_metadata),
            "batch": [message.content for message in chat.batch([messages] * 4)],
            "completion": OpenAI(**rest).invoke("the plot"),  # type: ignore[arg-type]
            "reason": whole.response_metadata["finish_reason"],
        }
    )
)
