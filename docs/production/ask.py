"""Ask the assistant. The same code talks to the server of lesson 4.4, to vLLM and to the gateway in front of it.

Which one, `OPENAI_BASE_URL` says, and `OPENAI_API_KEY` how: the `openai` package reads both.
"""

import sys

from openai import OpenAI


def ask(client: OpenAI, adapter: str, message: str) -> str:
    """The reply of an adapter ("triage", "handbook"), which the API names as a model."""
    reply = client.chat.completions.create(
        model=adapter, messages=[{"role": "user", "content": message}], temperature=0, max_tokens=128
    )
    return reply.choices[0].message.content or ""


if __name__ == "__main__":
    print(ask(OpenAI(timeout=10, max_retries=1), sys.argv[1], sys.argv[2]))
