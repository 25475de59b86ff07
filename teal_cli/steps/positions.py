"""What a model's positions cannot hold is refused before anything is made for it: a calibration takes minutes."""

from typing import Any

from teal_cli.config import AdaptConfig, BenchConfig, CalibrateConfig, EvalConfig, GenerateConfig, SharedConfig
from teal_cli.decode.chat import Message, encode_prompt, wants_chat
from teal_cli.errors import ArtefactError
from teal_cli.models.forward import check_context, check_positions, position_limit
from teal_cli.models.loading import configuration, outline
from teal_cli.models.tokenizing import load_tokenizer
from teal_cli.steps.bench_speculation import check_prompts, encoded_prompts
from teal_cli.workspace import Workspace

_LONG_PROMPT = 1 << 20


def require_fit(config: SharedConfig, workspace: Workspace, messages: list[Message] | None = None) -> None:
    """Refuse lengths that the model cannot take, of any verb.

    Args:
        config: of the verb.
        workspace: of its model.
        messages: of generate: what is going to be asked; None for its prompt, if it has one.

    Raises:
        UsageError: sequences that are longer than the model's table of positions.
        ArtefactError: texts that are longer than its context.
    """
    match config:
        case GenerateConfig():
            if messages is None and config.prompt not in (None, "-"):
                messages = [{"role": "user", "content": str(config.prompt)}]
            _require_reply(config, workspace, messages)
        case BenchConfig() if not config.random_weights:
            _require_timed(config, workspace)
        case EvalConfig():
            if config.generate:
                positions = config.prompt_tokens + config.new_tokens
                workspace.require_positions(config, positions, "--prompt-tokens and --new-tokens")
            check_positions(outline(workspace.source.folder, workspace.architecture(config)), config.seq_len)
        case CalibrateConfig() if "seq_len" not in config.model_fields_set:
            pass  # it takes as many as there are
        case AdaptConfig() | CalibrateConfig():
            check_positions(outline(workspace.source.folder, workspace.architecture(config)), config.seq_len)


def check_characters(tokenizer: Any, messages: list[Message], context: int) -> None:
    """Refuse what is longer than the model's context whatever its tokens: encoding 10 MB takes many seconds.

    Args:
        tokenizer: of the model.
        messages: the conversation.
        context: its positions.

    Raises:
        ArtefactError: it is longer.
    """
    characters = sum(len(message["content"]) for message in messages)
    if characters <= _LONG_PROMPT:
        return
    longest = max(map(len, tokenizer.get_vocab()), default=1)
    if characters > context * longest:
        raise ArtefactError(
            f"a prompt of {characters:,} characters exceeds the model's context of {context:,} tokens: shorten it"
        )


def _require_reply(config: GenerateConfig, workspace: Workspace, messages: list[Message] | None) -> None:
    if "max_new_tokens" in config.model_fields_set:  # what is the default, a reply may have less of
        workspace.require_positions(config, 1 + config.max_new_tokens, "a prompt and --max-new-tokens")
    limit, kind = position_limit(configuration(workspace.source.folder)), workspace.kind(config)
    if messages is None or limit is None or kind == "encoder":
        return
    tokenizer = load_tokenizer(workspace.source.folder)
    check_characters(tokenizer, messages, limit)
    prompt = encode_prompt(tokenizer, messages, wants_chat(tokenizer, config.chat))
    check_context(limit, prompt.shape[1], config.max_new_tokens, starts=1 if kind == "seq2seq" else None)


def _require_timed(config: BenchConfig, workspace: Workspace) -> None:
    workspace.require_positions(config, config.prompt_tokens + config.new_tokens, "--prompt-tokens and --new-tokens")
    limit = position_limit(configuration(workspace.source.folder))
    if config.speculate and limit is not None and workspace.kind(config) == "causal":
        check_prompts(config, limit, encoded_prompts(load_tokenizer(workspace.source.folder)))
