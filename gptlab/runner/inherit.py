"""A run that begins with another run's weights (trainer.init_from): its model and tokeniser are that run's, all else is its own.

Unlike trainer.start it is a training of its own: from step 0, on any text, with any optimizer. So an imported model is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gptlab.config.compose import inherits
from gptlab.config.errors import ConfigError
from gptlab.config.registry import component, component_of
from gptlab.config.schema import Config, ModelConfig
from gptlab.config.slots import Options
from gptlab.data.chat import chat_format
from gptlab.data.chat_corpus import ChatCorpus
from gptlab.data.mix import Mix
from gptlab.data.tokenizer import from_json
from gptlab.data.tokenizer_file import written_in
from gptlab.hardware.precision import in_precision
from gptlab.model.lora import added
from gptlab.model.transformer import Transformer, new_model
from gptlab.runner import checkpoint, sharded
from gptlab.runner.averages import load_weights
from gptlab.runner.run import PARENT, Run, find_run

if TYPE_CHECKING:
    from gptlab.runner.trainer import Trainer

EMBEDDING = "embedding.weight"
_ELSEWHERE: dict[str, Run] = {}  # the runs that this process has begun with, by identity: a directory may lie outside the runs' root
TABLE = "position.table.weight"  # of learned positions: a shorter context takes the first of them


@inherits
def inherit(config: Config, overrides: Sequence[str]) -> Config:
    """A composed config with the model and the tokeniser of the run that trainer.init_from names, as IDENTITY@STEP.

    What an override says of the model is kept; `model=RECIPE` keeps all of it. For chats the tokeniser gets the tokens of a chat, unless
    it has them. Raises ConfigError for no such run, or another tokeniser.
    """
    if not config.trainer.init_from:
        return config
    if config.trainer.start:
        raise ConfigError("trainer.init_from and trainer.start: a run begins anew with another's weights, or goes on with its training")
    keys = [o.lstrip("+~").partition("=")[0] for o in overrides]
    extends = component_of(config.data.tokenizer).name == "chat"
    asked = any(key.partition("@")[0] == "data/tokenizer" or key.startswith("data.tokenizer.") for key in keys)
    if asked and not (extends and not any(key == "data.tokenizer.base" for key in keys)):
        raise ConfigError(
            "trainer.init_from brings the tokeniser of its run, by which the weights are numbered: leave data/tokenizer out "
            "(data/tokenizer=chat alone adds the tokens of a chat to it)"
        )
    parent, found = _parent(config.trainer.init_from)
    _ELSEWHERE[parent.identity] = parent
    model = config.model if "model" in keys else _model(config.model, parent.config().model, keys)
    file = (parent.directory / "tokenizer.json").resolve()
    chats = _holds_chats(config.data.corpus)
    template = str(config.data.tokenizer.template) if extends else "gptlab"  # type: ignore[attr-defined]
    known = chat_format(from_json(written_in(str(file)), str(file)))
    if (asked and (known is None or known.name != template)) or (chats and known is None):
        tokenizer = _options("chat")(base=str(file), template=template)
    else:
        tokenizer = _options("file")(path=str(file))
    data = replace(config.data, tokenizer=tokenizer)
    return replace(
        config, model=model, data=data, trainer=replace(config.trainer, init_from=f"{parent.identity}@{checkpoint.step_of(found)}")
    )


def _options(tokenizer: str) -> Any:
    return component("data/tokenizer", tokenizer).options


def _holds_chats(corpus: Options) -> bool:
    factory = component_of(corpus).factory
    if issubclass(factory, Mix):  # type: ignore[arg-type]
        return any(_holds_chats(source) for source in corpus.sources.values())  # type: ignore[attr-defined]
    return isinstance(factory, type) and issubclass(factory, ChatCorpus)


def _model(composed: ModelConfig, theirs: ModelConfig, keys: Sequence[str]) -> ModelConfig:
    """Their model with what the keys (`model.dropout`, `model/kernel`, `model.attention.window`) say of the composed one."""
    made: Any = theirs
    for key in keys:
        field, _, option = key.removeprefix("model").lstrip("./").partition(".")
        if not key.startswith(("model.", "model/")):
            continue
        own, other = getattr(composed, field), getattr(made, field)
        if option and type(own) is type(other):  # one option of the same component
            own = replace(other, **{option: getattr(own, option)})
        made = replace(made, **{field: own})
    return made  # type: ignore[no-any-return]


def _parent(reference: str) -> tuple[Run, Path]:
    """The run of RUN[@STEP], and the checkpoint, whole: every hash is checked."""
    parent, (_, mark, which) = _run_of(reference), reference.rpartition("@")
    return parent, checkpoint.choose(parent.checkpoints, which if mark else "latest")


def _run_of(reference: str) -> Run:
    """The run of RUN[@STEP]."""
    name, mark, which = reference.rpartition("@")
    known = _ELSEWHERE.get(name)
    return known if known is not None and known.directory.is_dir() else find_run(name if mark else which)


def new_tokens(config: Config, vocabulary: int) -> int:
    """How many of a run's tokens the weights that it begins with do not know."""
    return max(0, vocabulary - known_tokens(_run_of(config.trainer.init_from))) if config.trainer.init_from else 0


def known_tokens(parent: Run) -> int:
    """The size of a run's vocabulary, before any padding."""
    return int(written_in(str(parent.directory))["vocabulary"])


def fill(trainer: Trainer) -> int:
    """Give a new run's model the weights it begins with; the step they are of. Every rank calls it.

    Raises ConfigError naming the first tensor of another shape.
    """
    config = trainer.config
    parent, found = _parent(config.trainer.init_from)
    own = {name: tensor for name, tensor in trainer.model.state_dict().items() if not added(name)}
    where = f"trainer.init_from={config.trainer.init_from}"
    if trainer.strategy.sharded:
        if new_tokens(config, trainer.data.vocabulary) or len(own) < len(trainer.model.state_dict()):
            raise ConfigError(f"{where}: what is added to a model is made from whole weights; use hardware/strategy=single or ddp")
        sharded.load_into(found, own, trainer.world.writers())
        checkpoint.fill(trainer.model, own, found)
    else:
        _, weights, _ = load_weights(found)
        beside = {name: tensor for name, tensor in trainer.model.state_dict().items() if added(name)}
        known = known_tokens(parent)
        checkpoint.fill(trainer.model, fitted(weights, own, where, known, trainer.data.vocabulary) | beside, found)
    return checkpoint.step_of(found)


def note(trainer: Trainer, step: int) -> None:
    """Write down in the run's folder whose weights, of which step, it began with."""
    parent = _run_of(trainer.config.trainer.init_from)
    if trainer.world.first:
        trainer.run.write(PARENT, {"run": parent.identity, "name": parent.name, "study": parent.study, "step": step})


def initial(trainer: Trainer) -> Transformer:
    """A model with the weights that a run begins with, on its device, in evaluation mode, without gradients.

    Raises ConfigError for a branch, whose beginning is another run's step, and for a sharded model.
    """
    config = trainer.config
    if config.trainer.start:
        raise ConfigError(
            "trainer.start goes on with a training; an objective that looks back at its first weights wants trainer.init_from"
        )
    if trainer.strategy.sharded:
        raise ConfigError("an objective that looks back at its first weights holds them whole: use hardware/strategy=single or ddp")
    model = new_model(config.model, trainer.data.vocabulary, int(config.seeds.init or 0))
    if config.trainer.init_from:
        parent, found = _parent(config.trainer.init_from)
        where = f"trainer.init_from={config.trainer.init_from}"
        weights = fitted(load_weights(found)[1], model.state_dict(), where, known_tokens(parent), trainer.data.vocabulary)
        checkpoint.fill(model, weights, found)
    in_precision(model, config.hardware.precision)
    return model.to(trainer.device).eval().requires_grad_(False)


def fitted(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str, known: int = 0, vocabulary: int = 0) -> dict[str, Tensor]:
    """The weights as a model takes them whose context may be shorter, and whose vocabulary larger than the `known` one.

    A new token's row, of the embedding and of a head of its own, is the mean of the known ones (Hewitt, 2021): its logit is then near the
    others' mean, and what the model says of the known tokens hardly moves. Raises ConfigError for the first tensor that does not fit.
    """
    made = dict(weights)
    if TABLE in own and TABLE in made and own[TABLE].shape[0] < made[TABLE].shape[0]:
        made[TABLE] = made[TABLE][: own[TABLE].shape[0]]
    if vocabulary > known > 0:
        before, after = (side[EMBEDDING].shape[0] for side in (made, own))
        for name, target in own.items():
            if name in made and name != TABLE and made[name].shape[0] == before and target.shape[0] == after and _by_token(name):
                made[name] = _with_new_rows(made[name], known, vocabulary, after)
    for name in [*own, *made]:
        theirs, ours = (tuple(side[name].shape) if name in side else None for side in (made, own))
        if theirs != ours:
            told = "is not there" if theirs is None else f"is {theirs} there" + (f" and {ours} here" if ours else ", and has no place here")
            raise ConfigError(f"{where}: {name} {told}; leave model.* and model/* as that run has them, or train from nothing")
    return made


def _by_token(name: str) -> bool:
    """Whether a tensor has a row for each token: the embedding, a head of its own, embeddings of values."""
    return name == EMBEDDING or name.startswith("head.") or ".value." in name


def _with_new_rows(rows: Tensor, known: int, vocabulary: int, after: int) -> Tensor:
    found = rows.new_zeros((after, *rows.shape[1:]))
    found[:known] = rows[:known]
    found[known:vocabulary] = rows[:known].float().mean(0).to(rows.dtype)
    return found
