"""Detectron2's trainer with mixed precision, batches in parts, and an early end."""

import logging
import math
import time
from contextlib import nullcontext

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..modeling.context import Accumulation, forward_context

logger = logging.getLogger(__name__)


def check_parts(images: int, parts: int) -> None:
    """Raise a ``ValueError`` unless a process's batch falls into so many equal parts."""
    if parts < 1 or images % parts:
        raise ValueError(f"a process's batch of {images} images has no {parts} equal parts")


class Trainer(SimpleTrainer):
    """Adds to Detectron2's trainer what is below, and keeps a resumed run's own settings.

    Args:
        amp: autocast, to half precision with scaled gradients on a GPU, to bfloat16, which needs no
            scaling, on a CPU.
        accumulate: parts of each batch that are computed in turn, to save memory. They make one
            step, whose losses and gradients are the whole batch's where these are sums over images
            or boxes; BatchNorm, the balance of experts and D-FINE's distillation see a part each.
    """

    stopped = False

    def __init__(
        self, model: nn.Module, loader, optimizer, amp: bool = False, accumulate: int = 1
    ) -> None:
        super().__init__(model, loader, optimizer)
        self.device = next(model.parameters()).device.type
        self.amp = amp
        self.accumulate = accumulate
        self.grad_scaler = torch.amp.GradScaler(self.device, enabled=amp and self.device == "cuda")

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        losses: dict[str, Tensor] = {}
        for index in range(self.accumulate):
            for name, loss in self.backward(data, index).items():
                part = loss.detach() / self.accumulate
                losses[name] = losses[name] + part if name in losses else part
        self.after_backward()
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def backward(self, data: list[dict], index: int) -> dict[str, Tensor]:
        """Add the gradients of one part of a batch; returns its losses."""
        parts = self.accumulate
        check_parts(len(data), parts)
        boxes = sum(len(x["instances"]) for x in data) if parts > 1 else None
        whole = None if boxes is None else Accumulation(parts, boxes)
        waits = isinstance(self.model, DistributedDataParallel) and index < parts - 1
        dtype = torch.float16 if self.device == "cuda" else torch.bfloat16
        with self.model.no_sync() if waits else nullcontext():
            with forward_context(accumulation=whole):
                with torch.autocast(self.device, dtype, enabled=self.amp):
                    losses = self.model(data[index::parts])
                    total = sum(losses.values()) / parts
            self.grad_scaler.scale(total).backward()
        return losses

    def state_dict(self) -> dict:
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def stop_early(self) -> None:
        """End training after the present step as if it were the last one."""
        self.stopped = True

    def train(self, start_iter: int, max_iter: int) -> None:
        logger.info("Starting training from iteration %d", start_iter)
        self.iter = self.start_iter = start_iter
        self.max_iter = max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    if self.stopped:
                        break
                else:
                    self.iter += 1
            finally:
                self.after_train()

    def load_state_dict(self, state: dict) -> None:
        """The optimizer's moments come back; its settings stay the config's, as all others do.

        Loading would bring back rates and decay, against what ``--resume optimizer.lr=...`` says.
        """
        groups = self.optimizer.param_groups
        saved = len(state["optimizer"]["param_groups"])
        if saved != len(groups):
            raise ValueError(
                f"the checkpoint's optimizer has {saved} groups of parameters with equal rates and "
                f"decay, the config's {len(groups)}: a resumed run can change these, but not merge "
                "or split the groups"
            )
        own = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        super().load_state_dict(state)
        if "grad_scaler" in state:
            self.grad_scaler.load_state_dict(state["grad_scaler"])
        changed = set()
        for group, settings in zip(self.optimizer.param_groups, own):
            settings["initial_lr"] = settings["lr"]  # which schedules multiply
            for key in ("initial_lr", "weight_decay", "betas"):
                if key in settings and group.get(key) != settings[key]:
                    changed.add(f"{key} {group.get(key)} -> {settings[key]}")
            group.update(settings)
        if changed:
            logger.warning("The config changes the optimizer: %s", ", ".join(sorted(changed)))

    def _write_metrics(self, loss_dict: dict[str, Tensor], *args, **kwargs) -> None:
        try:
            super()._write_metrics(loss_dict, *args, **kwargs)
        except FloatingPointError:
            bad = {k: v.item() for k, v in loss_dict.items() if not math.isfinite(v.item())}
            where = "" if bad else " on another process"
            message = f"training stops at iteration {self.iter}: losses not finite{where}: {bad}"
            raise FloatingPointError(message) from None
