"""litellm against a server: URL, model's id. Prints what it got as JSON."""

import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the network for prices
import litellm

url, name = sys.argv[1:]
rest = {"api_base": f"{url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 12}
messages = [{"role": "system", "content": "Go on."}, {"role": "user", "content": "the plot"}]
whole = litellm.completion(model=f"openai/{name}", messages=messages, **rest)
chunks = list(litellm.completion(model=f"openai/{name}", messages=messages, stream=True, **rest))
text = litellm.text_completion(model=f"text-completion-openai/{name}", prompt="the plot", **rest)
try:
    litellm.completion(model=f"openai/{name}", messages=messages, response_format={"type": "json_object"}, **rest)
    refused = ""
except litellm.BadRequestError as error:
    refused = str(error)
print(
    "REPORT "
    + json.dumps(
        {
            "text": whole.choices[0].message.content,
            "stream": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
            "tokens": whole.usage.total_tokens,
            "completion": text.choices[0].text,
            "reason": whole.choices[0].finish_reason,
            "refused": refused,
        }
    )
)
