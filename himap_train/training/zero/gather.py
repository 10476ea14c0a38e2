"""Trained weights and optimizer moments as whole tensors, wherever DeepSpeed keeps their parts.

ZeRO spreads the optimizer (stages 1 and 2) and the parameters (stage 3) over the processes: what a parameter's `data`
holds there may be empty or rounded. Here all that is known by the parameter alone, so that one function serves every
strategy. All functions must be called by every process, in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq")
_PARTS_1_AND_2 = "single_partition_of_fp32_groups"


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Names and full values of the trained parameters, on the CPU.

    Returns:
        Fp32 under ZeRO, the parameter's own type elsewhere; empty in all processes but the first.

    Raises:
        RuntimeError: A gathered tensor is empty.
    """
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    return _kept({name: _full_value(parameter) for name, parameter in trained.items()}) if trained else {}


def set_full_value(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter, and the fp32 copy that ZeRO's optimizer has of it, a full value that every process holds."""
    value = value.to(parameter.device)
    if hasattr(parameter, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            if _is_first():
                parameter.data.copy_(value)
    else:
        parameter.data.copy_(value)
    if _in_zero_optimizer(parameter):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, value)


def optimizer_state(zero: Any, groups: list[list[nn.Parameter]]) -> dict[str, Any]:
    """The state of a ZeRO optimizer as torch's AdamW would have it on one device, on the CPU.

    Args:
        zero: DeepSpeed's optimizer around AdamW.
        groups: The parameters of each group before DeepSpeed flattened them.

    Returns:
        `state` and `param_groups`; no state before the first step, nor in any process but the first.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    state: dict[int, dict[str, Tensor]] = {}
    steps = [part["step"] for part in zero.optimizer.state.values() if _MOMENTS[0] in part]
    if steps:
        _link_moments(zero)
    for index, parameter in enumerate(sum(groups, [])) if steps else ():
        full = _kept({key: safe_get_full_optimizer_state(parameter, key) for key in _MOMENTS})
        if full:
            state[index] = {"step": torch.as_tensor(steps[0]).cpu().clone(), **full}
    first, saved = 0, []
    for group, now in zip(groups, zero.optimizer.param_groups, strict=True):
        saved.append({**_settings(now), "params": list(range(first, first + len(group)))})
        first += len(group)
    return {"state": state, "param_groups": saved}


def load_optimizer_state(zero: Any, groups: list[list[nn.Parameter]], saved: Mapping[str, Any]) -> None:
    """Spread a state of torch's AdamW, which every process holds whole, over a ZeRO optimizer; see `optimizer_state`.

    Raises:
        ValueError: It is the state of another number of parameters.
    """
    from deepspeed.utils import safe_set_full_optimizer_state

    parameters = sum(groups, [])
    lengths = [len(group) for group in groups], [len(group["params"]) for group in saved["param_groups"]]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"the checkpoint's optimizer has groups of {lengths[1]} weights, this run's of {lengths[0]}: other parts "
            "are trained, or an older version trained weights in place under ZeRO-3, and then start anew from its "
            "adapter (model.init_adapter)"
        )
    for now, then in zip(zero.optimizer.param_groups, saved["param_groups"], strict=True):
        now.update(_settings(then))
    if not saved["state"]:
        return  # saved before the first step
    if len(saved["state"]) != len(parameters):
        raise ValueError(
            f"the checkpoint has moments of {len(saved['state'])} weights; this run trains {len(parameters)}"
        )
    parts = "fp32_partitioned_groups_flat" if hasattr(zero, "fp32_partitioned_groups_flat") else _PARTS_1_AND_2
    for part in getattr(zero, parts):
        empty = {key: torch.zeros_like(part.data) for key in _MOMENTS}
        zero.optimizer.state[part] = {"step": torch.as_tensor(saved["state"][0]["step"]).clone(), **empty}
    _link_moments(zero)
    for index, parameter in enumerate(parameters):
        for key in _MOMENTS:
            safe_set_full_optimizer_state(parameter, saved["state"][index][key].to(parameter.device), key)


def _link_moments(zero: Any) -> None:
    """Let each parameter find its moments. Stages 1 and 2 do so once, when only the first group has stepped."""
    if hasattr(zero, _PARTS_1_AND_2):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _full_value(parameter: nn.Parameter) -> Tensor:
    if _in_zero_optimizer(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    if hasattr(parameter, "ds_id"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


def _in_zero_optimizer(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")


def _kept(state: dict[str, Any]) -> dict[str, Tensor]:
    empty = [name for name, value in state.items() if value is None or value.numel() == 0]
    if empty:
        raise RuntimeError(f"{len(empty)} gathered tensors are empty, the first is {empty[0]}: nothing was saved")
    return {name: value.detach().cpu().clone() for name, value in state.items()} if _is_first() else {}


def _is_first() -> bool:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
