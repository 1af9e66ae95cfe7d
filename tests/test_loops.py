"""The same filters whoever runs the loop: timm, Accelerate, transformers, Lightning.

Each trains the network of a plain loop on the same batches; weights and masks must agree.
"""

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import prifu_plugin as prifu

pytestmark = pytest.mark.loops
STEPS, BATCH, RATE = 8, 6, 0.2


class Images(Dataset):
    """A few images and labels, as pairs or as the dicts that transformers wants."""

    def __init__(self, named=False):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(2, (STEPS * BATCH,), generator=generator)
        self.images = torch.rand(STEPS * BATCH, 3, 16, 16, generator=generator)
        self.images += 0.3 * self.labels[:, None, None, None]
        self.named = named

    def __len__(self):
        return len(self.images)

    def __getitem__(self, at):
        if self.named:
            return {"pixels": self.images[at], "labels": self.labels[at]}
        return self.images[at], self.labels[at]


def network():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2)
    return prifu.wrap(model, alpha=0.5, beta=0.2)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.5, weight_decay=1e-3)


@pytest.fixture(scope="module")
def reference():
    """What a plain loop makes."""
    model = network().train()
    optimizer = optimizer_of(model)
    for images, labels in DataLoader(Images(), BATCH):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    units = prifu.filters(model)
    assert sum(int(unit.closed.sum()) for unit in units.values()) > 0
    assert units["layer1.0.bn1"].dose == pytest.approx(STEPS * RATE * 0.2)
    return model


def agree(model, reference):
    """Weights as in the plain loop, masks equal, the decay as often."""
    for (path, unit), expected in zip(
        prifu.filters(model).items(), prifu.filters(reference).values(), strict=True
    ):
        torch.testing.assert_close(unit.weight, expected.weight, rtol=1e-4, atol=1e-6)
        assert torch.equal(unit.closed, expected.closed), path
        assert unit.dose == pytest.approx(expected.dose)
    pruned = prifu.prune(model.eval(), torch.zeros(2, 3, 16, 16))
    x = Images().images[:3]
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-4, atol=1e-5)


def test_timm_training_task(reference):
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.task import ClassificationTask

    model = network()
    task = ClassificationTask(model, criterion=nn.CrossEntropyLoss(), verbose=False).train()
    optimizer = create_optimizer_v2(
        model, opt="momentum", lr=RATE, momentum=0.5, weight_decay=1e-3, filter_bias_and_bn=False
    )
    schedule, _ = create_scheduler_v2(optimizer, sched="step", num_epochs=1, decay_epochs=5)
    for update, (images, labels) in enumerate(DataLoader(Images(), BATCH)):
        task(images, labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step_update(update)
    agree(model, reference)


def test_accelerate(reference):
    from accelerate import Accelerator

    model = network().train()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = DataLoader(Images(), BATCH // 2)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
    for images, labels in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(nn.functional.cross_entropy(prepared(images), labels))
            optimizer.step()
            optimizer.zero_grad()
    units = prifu.filters(accelerator.unwrap_model(prepared))
    # Batch norms see half batches, so only the number of decays is the plain loop's.
    for path, unit in prifu.filters(reference).items():
        assert units[path].dose == pytest.approx(unit.dose)


def test_accelerate_without_accumulation(reference):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = network().train()
    prepared, optimizer, loader = accelerator.prepare(
        model, optimizer_of(model), DataLoader(Images(), BATCH)
    )
    for images, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(prepared(images), labels))
        optimizer.step()
    agree(accelerator.unwrap_model(prepared), reference)


class ForTrainer(nn.Module):
    """A model as transformers calls it: named inputs, a loss among the outputs."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixels, labels=None):
        logits = self.net(pixels)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_transformers_trainer(reference, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = ForTrainer(network())
    arguments = TrainingArguments(
        output_dir=tmp_path, num_train_epochs=1, per_device_train_batch_size=BATCH, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", max_grad_norm=0.0,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip

    class InOrder(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(Images())

    optimizer = optimizer_of(model)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    InOrder(
        model, arguments, train_dataset=Images(named=True), optimizers=(optimizer, constant)
    ).train()
    agree(model.net, reference)


def trainer_in(folder, model, steps):
    """Return a Trainer with the optimizer and schedule it makes itself, saving after 4 steps."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, use_cpu=True,
        learning_rate=0.1, weight_decay=0.1, report_to=[], save_strategy="steps", save_steps=4,
        logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        lr_scheduler_type="constant",
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Images(named=True))


def test_transformers_trainer_with_its_own_optimizer_resumes(tmp_path):
    whole, resumed = ForTrainer(network()), ForTrainer(network())
    trainer_in(tmp_path / "whole", whole, STEPS).train()
    unit = prifu.filters(whole.net)["layer1.0.bn1"]
    assert unit.dose == pytest.approx(STEPS * 0.1 * 0.2)
    trainer_in(tmp_path / "first", ForTrainer(network()), 4).train()
    again = trainer_in(tmp_path / "first", resumed, STEPS)
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
    closed = 0
    for (path, unit), other in zip(
        prifu.filters(whole.net).items(), prifu.filters(resumed.net).values(), strict=True
    ):
        torch.testing.assert_close(unit.weight, other.weight, rtol=1e-4, atol=1e-6, msg=path)
        assert torch.equal(unit.closed, other.closed), path
        assert unit.dose == pytest.approx(other.dose)
        closed += int(unit.closed.sum())
    assert closed > 0


def test_timm_scaler_checkpoints_and_average(reference, tmp_path):
    """timm's train.py: NativeScaler makes the steps, CheckpointSaver keeps model and average."""
    from timm.models import load_checkpoint
    from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler

    model = network().train()
    optimizer, scaler, average = optimizer_of(model), NativeScaler("cpu"), ModelEmaV3(model)
    saver = CheckpointSaver(
        model, optimizer, amp_scaler=scaler, model_ema=average, checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )  # fmt: skip
    for images, labels in DataLoader(Images(), BATCH):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        scaler(loss, optimizer, parameters=model.parameters())
        average.update(model)
    saver.save_checkpoint(0, metric=0.5)
    agree(model, reference)
    for use_ema, source in ((False, model), (True, average.module)):
        loaded = network()
        load_checkpoint(loaded, str(tmp_path / "last.pth.tar"), use_ema=use_ema)
        for unit, expected in zip(
            prifu.filters(loaded).values(), prifu.filters(source).values(), strict=True
        ):
            assert torch.equal(unit.weight, expected.weight)
            assert torch.equal(unit.closed, expected.closed)
            assert unit.dose == pytest.approx(expected.dose)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*number of training batches")
def test_lightning(reference, tmp_path):
    import pytorch_lightning as lightning

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch):
            images, labels = batch
            return nn.functional.cross_entropy(self.net(images), labels)

        def configure_optimizers(self):
            return optimizer_of(self)

    task = Task()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, DataLoader(Images(), BATCH))
    agree(task.net, reference)


def test_tensorboard_shows_what_filters_do(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = network()
    history = prifu.MaskHistory(model)
    with SummaryWriter(tmp_path) as writer:
        for step in range(3):
            prifu.filters(model)["layer1.0.bn1"].weight.data[:step] = 0.0
            for name, value in history.record(step).items():
                writer.add_scalar(f"filters/{name}", value, step)
    events = EventAccumulator(str(tmp_path)).Reload()
    units = prifu.filters(model)
    width = len(units["layer1.0.bn1"].weight)
    shown = [event.value for event in events.Scalars("filters/open/layer1.0.bn1")]
    assert shown == [width, width - 1, width - 2]
    assert [event.value for event in events.Scalars("filters/closed now")] == [0, 1, 1]
