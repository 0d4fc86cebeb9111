"""The model as the gateway knows it: its name, its tokenizer, its template and the sampling it recommends; no weights.

What takes long here (`chat_prompt`, `text_prompts`) is called in a thread, never on the event loop.
"""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenllm.checkpoint.description import SamplingDefaults, describe
from tokenllm.config import GatewayBirth
from tokenllm.text.template import PLAIN, ChatTemplate, Message, TemplateError, TemplateOptions, Tool
from tokenllm.text.tokenizer import Tokenizer, load_tokenizer
from tokenllm_schemas.errors import invalid
from tokenllm_schemas.requests import INT32_MAX, ChatMessage, TemplateFields

ROLES = {"developer": "system", "function": "tool"}  # those that few templates know, and what means the same


class ServedModel(NamedTuple):
    name: str
    created: int  # seconds since 1970: when it began to be served here
    tokenizer: Tokenizer
    template: ChatTemplate
    sampling: SamplingDefaults
    longest_token: int  # in bytes
    vocab_size: int  # ids below have a text and an embedding
    hidden_size: int  # the length of a vector

    @classmethod
    def load(cls, birth: GatewayBirth) -> "ServedModel":
        path = Path(birth.model_path)
        tokenizer, description = load_tokenizer(path), describe(path)
        return cls(
            name=birth.model_name,
            created=int(time.time()),
            tokenizer=tokenizer,
            template=ChatTemplate.load(path, birth.config.chat_template),
            sampling=description.sampling,
            longest_token=max(map(len, tokenizer.pieces.values())),
            vocab_size=min(tokenizer.vocab_size, description.vocab_size),
            hidden_size=description.hidden_size,
        )

    def check_size(self, texts: Iterable[str], param: str, max_model_len: int) -> None:
        """Refuse at once what cannot fit into the context: to tokenize it might take seconds."""
        size, most = sum(len(text.encode()) for text in texts), self.longest_token * max_model_len
        if size > most:
            message = f"{size} bytes are too many: the context of {max_model_len} tokens ends before byte {most}"
            raise invalid(param, message, "context_length_exceeded")

    def chat_prompt(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool] = (),
        options: TemplateOptions = PLAIN,
        max_model_len: int = INT32_MAX,
    ) -> list[int]:
        """The ids of a conversation, up to where the assistant's turn begins or, if asked, goes on."""
        turns = [_turn(message) for message in messages]
        try:
            prompt = self.template.render_hidden(turns, tools, options, self.tokenizer.hide_specials)
            self.check_size([prompt.text], "messages", max_model_len)
            ids = prompt.ids(self.tokenizer)
        except TemplateError as error:
            raise invalid("messages", str(error)) from None
        return self.known(ids, "messages")

    def text_prompts(self, prompts: Sequence[str | list[int]], param: str, specials: bool = True) -> list[list[int]]:
        """The ids of each text; ids are checked and stay what they are."""
        return [self._text_prompt(prompt, param, specials) for prompt in prompts]

    def _text_prompt(self, prompt: str | list[int], param: str, specials: bool) -> list[int]:
        if isinstance(prompt, list):
            return self.known(prompt, param)
        try:
            ids = self.tokenizer.encode(prompt)
        except ValueError as error:
            raise invalid(param, str(error)) from None
        bos = self.tokenizer.bos_id if specials and self.tokenizer.adds_bos else None
        return self.known(ids if bos is None else [bos, *ids], param)

    def known(self, ids: list[int], param: str) -> list[int]:
        """These ids, none of which is beyond the vocabulary."""
        if (largest := max(ids, default=0)) >= self.vocab_size:
            raise invalid(param, f"token id {largest} is not in the vocabulary of {self.vocab_size}")
        return ids


def template_options(body: TemplateFields) -> TemplateOptions:
    """What a request asks of the chat template. The assistant's turn is opened for whoever does not say otherwise."""
    verbosity = {"verbosity": body.verbosity} if body.verbosity else {}
    return TemplateOptions(
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        variables={**verbosity, **(body.chat_template_kwargs or {})},
        reasoning_effort=body.reasoning_effort,
        documents=body.documents or (),
    )


def _turn(message: ChatMessage) -> Message:
    """A message in the words of chat templates."""
    extras = {
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "tool_calls": [call.model_dump(exclude_none=True) for call in message.calls()],
        "reasoning_content": message.reasoning_content,
        "reasoning": message.reasoning,
    }
    content = None if message.content is None and message.refusal is None else message.text() or message.refusal or ""
    role = ROLES.get(message.role, message.role)
    return {"role": role, "content": content, **{key: value for key, value in extras.items() if value}}
