"""What a trained model costs when it writes, as a callback: so that arms of an ablation can be compared in that, too."""

from __future__ import annotations

import copy
import statistics
import time

from gptlab.config.errors import ConfigError
from gptlab.config.product import cpu_multiplies_bf16
from gptlab.config.registry import register
from gptlab.data.loader import held_out_batches
from gptlab.generate.engine import generate
from gptlab.generate.sampling import Sampling
from gptlab.generate.weights import PRECISIONS, for_generation, held_bytes
from gptlab.hardware.device import synchronise
from gptlab.model.transformer import Transformer
from gptlab.runner.callback import Callback
from gptlab.runner.trainer import Trainer
from gptlab.runner.validation import held_out_sums
from gptlab.tracker.protocol import Metrics

PROMPT = 16  # tokens of held-out text, or a quarter of the context


@register("callback", "inference")
class Inference(Callback):
    """At the end, for each of fp32, bf16 and int8: held-out loss, tokens a second, milliseconds to the first token, bytes of the weights.

    Beside them the bytes that the cache holds for each row. The median of `repeats` texts of `tokens` tokens (as many as fit the
    context), `rows` side by side; costs an evaluation and some seconds for each number format. bf16 is left out on a CPU without it.
    """

    def __init__(self, *, tokens: int = 64, rows: int = 1, repeats: int = 5) -> None:
        for name, value in (("tokens", tokens), ("rows", rows), ("repeats", repeats)):
            if value < 1:
                raise ConfigError(f"callbacks.inference.{name}={value} must be at least 1")
        self.tokens, self.rows, self.repeats = tokens, rows, repeats

    def on_start(self, trainer: Trainer) -> None:
        if trainer.world.size > 1:
            raise ConfigError("callback=inference needs the whole model in one process; train with one, or `gptlab bench generate` later")

    def on_end(self, trainer: Trainer) -> None:
        with trainer.averages.using("default"):
            trained = copy.deepcopy(trainer.model).eval()
        context = trained.config.context_length
        batch = next(held_out_batches(trainer.data, "val", context, 0, self.rows))
        prompts = batch.inputs[: self.rows, : max(1, min(PROMPT, context // 4))].tolist()
        found: Metrics = {"inference/cache_bytes": trained.new_cache(1, context).bytes_when_full}
        for precision in PRECISIONS:
            if precision == "bf16" and trainer.device.type == "cpu" and not cpu_multiplies_bf16():
                continue
            model, name = for_generation(copy.deepcopy(trained), precision), f"inference/{precision}"
            found[f"{name}/loss"] = held_out_sums(model, trainer.data, "val", trainer.config).metrics("val")["val/loss"]
            first, rest = self._timed(model, prompts, trainer)
            found |= {f"{name}/first_token_ms": 1000 * first, f"{name}/tokens_per_second": rest, f"{name}/weight_bytes": held_bytes(model)}
        trainer.record(found)

    def _timed(self, model: Transformer, prompts: list[list[int]], trainer: Trainer) -> tuple[float, float]:
        """Seconds to the first token, and tokens a second after it."""
        tokens = max(2, min(self.tokens, model.config.context_length - len(prompts[0])))
        firsts, rates = [], []
        for _ in range(self.repeats + 1):
            synchronise(trainer.device)
            started = time.perf_counter()
            made = generate(model, prompts, Sampling(max_tokens=tokens, top_k=50))
            next(made)
            first = time.perf_counter()
            count = sum(1 for _ in made) + 1 - len(prompts)
            synchronise(trainer.device)
            firsts.append(first - started)
            rates.append(count / (time.perf_counter() - first))
        return statistics.median(firsts[1:]), statistics.median(rates[1:])
