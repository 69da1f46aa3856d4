"""Finding the decoder layers of a Transformers model and their MLPs, by shape instead of by architecture name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .errors import NoSuchLayerError, UnsupportedModelError
from .memory import MemoryHost


@dataclass
class DecoderLayers:
    """The decoder layers of a model.

    Args:
        owner: the module that runs them; it sees the attention mask.
        name: of the ModuleList within the model.
        blocks: the layers.
        width: of the hidden states (D).
    """

    owner: nn.Module
    name: str
    blocks: nn.ModuleList
    width: int

    def index(self, module_name: str) -> int:
        """The decoder layer that a module within it belongs to."""
        return int(module_name.removeprefix(f"{self.name}.").split(".")[0])

    def chosen(self, layers: Sequence[int] | None) -> list[int]:
        """Indices of decoder layers, ascending, of which negative ones count from the end; None: `default_layers`.

        Raises:
            NoSuchLayerError: for a layer that there is not, or one that is named twice.
        """
        depth = len(self.blocks)
        if layers is None:
            return default_layers(depth)
        for layer in layers:
            if not -depth <= layer < depth:
                raise NoSuchLayerError(
                    f"layer index {layer} is out of range: the model has {depth} decoder layers (0 to {depth - 1}; "
                    f"from the end, -1 to {-depth})"
                )
        found = sorted({layer % depth for layer in layers})
        if len(found) < len(layers):
            raise NoSuchLayerError(f"layers = {list(layers)} name one of the model's {depth} decoder layers twice")
        return found

    def mlp_names(self, layers: Sequence[int], *, replace: bool) -> list[str]:
        """Full names of the MLPs of some layers, each checked to be one that a memory can stand beside.

        Args:
            layers: as `chosen` returns them.
            replace: whether the memory stands in its place, so that its output must be one tensor of its input's shape.
        """
        return [f"{self.name}.{layer}.{self._mlp(layer, replace=replace)}" for layer in layers]

    def _mlp(self, layer: int, *, replace: bool) -> str:
        block = self.blocks[layer]
        children = dict(block.named_children())
        if "mlp" in children:
            candidates = ["mlp"]
        else:
            candidates = [n for n, child in children.items() if not _other_job(n, child) and self._keeps_shape(child)]
        if len(candidates) != 1:
            found = f"{len(candidates)} of its modules fit ({candidates})" if candidates else "none of its modules fits"
            raise UnsupportedModelError(
                f"decoder layer {layer} ({type(block).__name__}) has no single MLP module: no child is named 'mlp' "
                f"and {found}, of {[f'{n}: {type(c).__name__}' for n, c in children.items()]}. "
                "Memory layers need one module a layer that maps hidden states to hidden states"
            )
        mlp = children[candidates[0]]
        base = mlp.base_layer if isinstance(mlp, MemoryHost) else mlp
        if replace and (_required_inputs(base) != 1 or not self._keeps_shape(base)):
            raise UnsupportedModelError(
                f"the MLP of layer {layer} ({type(base).__name__}) takes or returns more than hidden states; a memory "
                'cannot stand in its place. Use mode="additive"'
            )
        return candidates[0]

    @torch.no_grad()
    def _keeps_shape(self, module: Any) -> bool:
        """Whether the module maps `[1, 2, D]` to one tensor of that shape, found by calling it."""
        like = next(module.parameters(), None)
        if like is None:
            return False
        dtype = like.dtype if like.is_floating_point() else torch.float32
        was_training = module.training
        module.eval()
        try:
            out = module(torch.zeros(1, 2, self.width, dtype=dtype, device=like.device))
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
            return False
        finally:
            module.train(was_training)
        return isinstance(out, Tensor) and out.shape == (1, 2, self.width)


def _other_job(name: str, module: nn.Module) -> bool:
    text = f"{name} {type(module).__name__}".lower()
    return any(part in text for part in ("attn", "attention", "norm", "ln_", "rotary", "embed"))


def _required_inputs(module: Any) -> int:
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def default_layers(depth: int) -> list[int]:
    """One quarter, the middle and three quarters of the depth: 24 layers -> [6, 12, 18], 6 -> [2, 3, 4]."""
    return sorted({min(layer, depth - 1) for layer in (-(-depth // 4), depth // 2, 3 * depth // 4)})


def find_decoder(model: nn.Module) -> DecoderLayers:
    """The ModuleList of `num_hidden_layers` entries; raises UnsupportedModelError where there is not exactly one."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no Transformers config; memory layers need a Transformers decoder-only model"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder; memory layers need a decoder-only model"
        )
    text = config.get_text_config()
    depth, width = getattr(text, "num_hidden_layers", None), getattr(text, "hidden_size", None)
    modules = dict(model.named_modules())
    lists = {n: m for n, m in modules.items() if isinstance(m, nn.ModuleList) and len(m) == depth}
    # a mixture of as many experts as layers has such a list within each layer
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    if not isinstance(width, int) or len(outer) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} must have one ModuleList of num_hidden_layers={depth} decoder layers and a "
            f"hidden_size; found lists {outer} and hidden_size={width}"
        )
    name = outer[0]
    owner, blocks = modules[name.rpartition(".")[0]], lists[name]
    if "attention_mask" not in inspect.signature(owner.forward).parameters:
        raise UnsupportedModelError(
            f"{type(owner).__name__}, which runs the layers, takes no attention_mask to tell pads from tokens by"
        )
    return DecoderLayers(owner, name, blocks, width)


def refuse_base(model: nn.Module) -> None:
    """Raise UnsupportedModelError, naming the reason, for bases that would train wrongly or not at all."""
    config = getattr(model, "config", None)
    quantised = [
        flag
        for flag in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")
        if getattr(model, flag, None)
    ]
    quantised += ["config.quantization_config"] if getattr(config, "quantization_config", None) else []
    quantised += [n for n, p in model.named_parameters() if type(p).__name__ in ("Params4bit", "Int8Params")][:1]
    if quantised:
        raise UnsupportedModelError(
            f"the base is quantised ({', '.join(quantised)}), which memory layers do not support yet: load it in "
            "bfloat16 (dtype=torch.bfloat16)"
        )
    sizes = [getattr(model, name, None) for name in ("_tp_size", "tp_size")]
    sharded = [n for n, p in model.named_parameters() if type(p.data).__name__ == "DTensor"][:1]
    if sharded or any(isinstance(size, int) and size > 1 for size in sizes):
        raise UnsupportedModelError(
            "the base is split over devices by tensor parallelism, which memory layers do not support; load it without "
            "tp_plan and use data parallelism (torchrun with DDP)"
        )
    foreign = sorted(
        {
            f"{type(m).__module__}.{type(m).__name__}"
            for m in model.modules()
            if isinstance(m, BaseTunerLayer) and not isinstance(m, MemoryHost)
        }
    )
    if foreign:
        raise UnsupportedModelError(
            f"another PEFT adapter is already attached ({', '.join(foreign)}); merge or unload it first "
            "(model = peft_model.merge_and_unload()), then attach the memory to the plain base"
        )
    if isinstance(model, PeftModel):
        raise UnsupportedModelError(
            f"the model is a {type(model).__name__} already, with adapters {list(model.peft_config)}; "
            "model.add_adapter(name, config) adds a memory beside another, model.unload() gives the plain base back"
        )


def positions_of(config: Any) -> int:
    """Tokens that a model of this configuration reads at most; a million where it does not say."""
    return getattr(config, "max_position_embeddings", None) or 1_000_000
