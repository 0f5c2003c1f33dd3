"""
Times GRPO steps of one competitor in a process of its own, for tests/bench_grpo.py:

    grpo_step.py ours|naive|trl|trl-answers CASE FOLDER

CASE is JSON: lengths P of prompts and C of answers, vocabulary V, G answers a prompt, tiles a
prompt, layers of the model, measured steps; perhaps "widths" of the model, "rows" (answers per
forward with a gradient), "device", and "count": true to have the products of a step counted, which
takes memory of its own. FOLDER holds what make() wrote. Prints a JSON line, {"steps": [{phase:
seconds}], "gflop": of the products, "peak_gb": ...}. Linux only, for the peak.

All of them: fp32 weights, on a GPU bf16 by autocast, two prompts a step, no gradient checkpointing,
sampling from the plain softmax.
The model has no logit for the end of sequence, so every answer has C tokens; every other answer
earns 1. Shapes: B prompts, N = B*G answers.
"""

import copy
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

PROMPTS = 2
BETA = 0.04
LR = 1e-6
TILE_TOKENS = 64  # of 64 x 64 pixels: patches of 4 x 4, of which four are a token
PHASES = ("prefill", "decode", "reference", "policy", "optimiser")


# ------------------------------------------------------------------------- the same for all of them
def device_of(case):
    return case.get("device", "cpu")


def autocast(case):
    """As common.autocast(), which TRL's interpreter may lack the packages for."""
    device = device_of(case)
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def make(folder, case):
    """Random weights, and a tokenizer whose words are the ids: V - 1 is the image placeholder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    torch.manual_seed(0)
    text = {"model_type": "qwen3", "vocab_size": case["V"], "hidden_size": 256,
            "intermediate_size": 768, "num_hidden_layers": case["layers"], "num_attention_heads": 8,
            "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096,
            "tie_word_embeddings": False, "pad_token_id": 0} | case.get("widths", {})
    vision = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
              "num_attention_heads": 4, "image_size": [64, 64], "patch_size": [4, 4]}
    with torch.device(device_of(case)):
        if case["tiles"]:
            model = transformers.InternVLForConditionalGeneration(transformers.InternVLConfig(
                text_config=text, vision_config=vision, image_token_id=case["V"] - 1,
                image_seq_length=TILE_TOKENS, tie_word_embeddings=False))
        else:
            model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text))
    model.save_pretrained(folder)
    words = ["<pad>", *map(str, range(1, case["V"])), "<eos>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def load(folder, case, attention="sdpa"):
    """-> model, tokenizer"""
    auto = transformers.AutoModelForCausalLM
    if case["tiles"]:
        auto = transformers.AutoModelForImageTextToText
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return model.to(device_of(case)), tokenizer


def draw_inputs(case, prompts):
    """-> ids [B, P], pixels [B, tiles, 3, 64, 64] or None, rewards [B, G]"""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, case["V"] - 1, (prompts, case["P"]), generator=generator)
    rewards = (torch.arange(case["G"]).double() % 2).repeat(prompts, 1)
    if not case["tiles"]:
        return ids, None, rewards
    ids[:, 4:4 + case["tiles"] * TILE_TOKENS] = case["V"] - 1
    return ids, torch.randn(prompts, case["tiles"], 3, 64, 64, generator=generator), rewards


def flop_in_place(total, a, b, **_):
    """The shapes of total += a @ b -> its operations"""
    return 2 * a[0] * a[1] * b[1]


class Stopwatch:
    """Splits a step where models and optimiser are called, which all competitors do in this order:
    `prefill` ends with the policy's first forward, `decode` where the reference is called,
    `reference` where the policy is called with a gradient, `policy` (forward, backward, clip) where
    the optimiser steps. What is done between two calls counts with the first. `count`: the first
    step, which warms up, has its products of matrices counted, on a CPU without attention's."""

    def __init__(self, policy, reference, count=False):
        self.steps, self.count = [], count
        # TRL's head adds up its gradients in place, which PyTorch's counter leaves out
        self.counter = FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.addmm_: flop_in_place})
        policy.register_forward_pre_hook(self.before_policy)
        policy.register_forward_hook(self.after_policy)
        reference.register_forward_pre_hook(lambda *_: self.enter("reference"))
        self.handle = register_optimizer_step_pre_hook(lambda *_: self.enter("optimiser"))

    def start(self):
        if self.count and not self.steps:
            self.counter.__enter__()
        self.spent = dict.fromkeys(PHASES, 0.0)
        self.phase, self.began = "prefill", self.now()

    @staticmethod
    def now():
        if torch.cuda.is_initialized():  # what was asked of the GPU must be done
            torch.cuda.synchronize()
        elif torch.get_num_threads() == 1:  # seconds of CPU: what else is running does not count
            return time.process_time()
        return time.perf_counter()

    def enter(self, phase):
        now = self.now()
        self.spent[self.phase] += now - self.began
        self.phase, self.began = phase, now

    def before_policy(self, *_):
        if torch.is_grad_enabled():
            self.enter("policy")

    def after_policy(self, *_):
        if self.phase == "prefill":
            self.enter("decode")

    def stop(self):
        self.enter("prefill")
        if self.count and not self.steps:
            self.counter.__exit__(None, None, None)
        self.steps.append(self.spent)


# ------------------------------------------------------------------------------ ours and the naive
class Ours:
    """The functions that stage 1 calls in a step, with tiles stage 3."""
    attention = "grouped"  # as common.load() has it

    def __init__(self, case, prompts=PROMPTS):
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        import common  # here, because TRL's interpreter needs neither
        import stage1_text_grpo
        import stage3_mm_grpo
        self.stage = stage3_mm_grpo if case["tiles"] else stage1_text_grpo
        placeholder = case["V"] - 1 if case["tiles"] else None
        self.encoder = SimpleNamespace(eos_ids=[case["V"]], pad_id=0, image_token_id=placeholder)
        ids, pixels, self.rewards = draw_inputs(case, prompts)
        pixels = [None] * prompts if pixels is None else pixels
        self.prompts = [common.Prompt(*of_prompt)
                        for of_prompt in zip(ids.tolist(), pixels, strict=True)]
        self.cfg = self.stage.Config(group_size=case["G"], max_new_tokens=case["C"], beta=BETA)
        if "rows" in case:
            self.cfg.micro_batch = case["rows"] // case["G"]
        self.sampled = None

    def sample(self, model):
        """-> answers [B][G]"""
        rollout = self.stage.roll_out(model, self.encoder, self.prompts, self.cfg, None)
        self.sampled = rollout.logp
        return rollout.ids

    def update(self, model, reference, optimizer, answers):
        """-> metrics, with the loss and the norm of the gradient before it is clipped"""
        cfg = self.cfg
        advantage, keep = self.stage.advantages(self.rewards, self.rewards, cfg.advantage,
                                                cfg.scale_std, cfg.sigma)
        return self.stage.grpo_update(model, reference, self.encoder, optimizer, self.prompts,
                                      answers, advantage, keep, cfg, self.sampled)


class Naive:
    """The same step as most would write it: every prompt G times, generate(), whole forwards. The
    prompts have one length and so have the answers: nothing is padded."""
    attention = "sdpa"

    def __init__(self, case, prompts=PROMPTS):
        self.case = case
        device = device_of(case)
        ids, pixels, self.rewards = draw_inputs(case, prompts)
        self.ids = ids.repeat_interleave(case["G"], 0).to(device)                      # [N, P]
        self.media = {}
        if pixels is not None:
            pixels = pixels.to(device)
            self.media["pixel_values"] = pixels.repeat_interleave(case["G"], 0).flatten(0, 1)

    def sample(self, model):
        """-> answers [B][G]"""
        with autocast(self.case):
            full = model.generate(
                input_ids=self.ids, attention_mask=torch.ones_like(self.ids), **self.media,
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=self.case["C"],
                eos_token_id=self.case["V"], pad_token_id=0,
                suppress_tokens=[self.case["V"] - 1] if self.media else None)          # [N, P+C]
        return full[:, self.case["P"]:].unflatten(0, (-1, self.case["G"])).tolist()

    def logps(self, model, answers):
        """answers [N, C] -> their log-probs [N, C]"""
        sequences = torch.cat([self.ids, answers], 1)
        with autocast(self.case):
            logits = model(input_ids=sequences, use_cache=False, **self.media).logits  # [N, P+C, V]
        logits = logits[:, self.case["P"] - 1:-1].float()                              # [N, C, V]
        if self.media:  # the placeholder is never sampled
            logits[..., self.case["V"] - 1] = torch.finfo(torch.float32).min
        return logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]

    def loss(self, logp, ref):
        """[N, C] each. Of answers of one length, the mean of their means is the mean."""
        centred = self.rewards - self.rewards.mean(1, keepdim=True)                    # [B, G]
        std = self.rewards.std(1, correction=0, keepdim=True)
        advantage = (centred / std).float().flatten()[:, None].to(logp.device)         # [N, 1]
        ratio = (logp - logp.detach()).exp()
        policy = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        kl = (ref - logp).exp() - (ref - logp) - 1
        return (policy + BETA * kl).mean()

    def update(self, model, reference, optimizer, answers):
        answers = torch.tensor(answers, device=self.ids.device).flatten(0, 1)
        rows = self.case.get("rows", len(answers))
        total = 0.0
        for first in range(0, len(answers), rows):
            part = self.part(first, rows)
            of_part = answers[first:first + rows]
            with torch.no_grad():
                ref = part.logps(reference, of_part)
            loss = part.loss(part.logps(model, of_part), ref) * (len(of_part) / len(answers))
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": total, "grad_norm": norm.item()}

    def part(self, first, rows):
        """The same of `rows` answers from this one on: whole groups."""
        part = copy.copy(self)
        part.ids = self.ids[first:first + rows]
        group = self.case["G"]
        part.rewards = self.rewards[first // group:(first + rows) // group]
        part.media = {}
        for name, pixels in self.media.items():
            tiles = self.case["tiles"]
            part.media[name] = pixels[first * tiles:(first + rows) * tiles]
        return part


def run(competitor, case, folder):
    """-> the Stopwatch of all steps"""
    model, tokenizer = load(folder, case, competitor.attention)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    watch = Stopwatch(model, reference, case.get("count", False))
    for _ in range(1 + case["steps"]):
        watch.start()
        answers = competitor.sample(model)
        for group in answers:
            tokenizer.batch_decode(group)  # what a reward would read
            assert [len(answer) for answer in group] == [case["C"]] * case["G"]
        competitor.update(model, reference, optimizer, answers)
        watch.stop()
    return watch


# --------------------------------------------------------------------------------------------- TRL
class ReadyImages(transformers.ProcessorMixin):
    """In place of InternVLProcessor, which needs torchvision. A prompt's text is its number; ids
    and pixels are ready, as they are for the others."""

    def __init__(self, tokenizer, ids, pixels):
        self.tokenizer, self.ids, self.pixels = tokenizer, ids.tolist(), pixels

    def apply_chat_template(self, conversation, tokenize=True, **_):
        if not tokenize:
            return conversation[-1]["content"][-1]["text"]
        numbers = [prompt[-1]["content"][-1]["text"] for prompt in conversation]
        return {"input_ids": [self.ids[int(number)] for number in numbers], **self(numbers)}

    def __call__(self, text, **_):
        return {"pixel_values": torch.cat([self.pixels[int(number)] for number in text])}

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)


def trl_rows(ids, pixels):
    """The prompts as rows of TRL's dataset. It only counts the images."""
    rows = []
    for number, prompt in enumerate(ids.tolist()):
        if pixels is None:
            rows.append({"prompt": " ".join(map(str, prompt))})
        else:
            rows.append({"prompt": [{"role": "user", "content": str(number)}],
                         "images": list(range(len(pixels[number])))})
    return rows


def run_trl(case, folder, answers_only):
    """-> the Stopwatch of all steps. `answers_only`: with Triton, TRL's head runs over the
    tokens whose label counts, without it over prompts, too (add_fused_lm_head of trl 1.16). This
    has it choose as with Triton; the kernels ask on their own, and stay those of the CPU."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import utils
    if answers_only:
        assert utils._use_triton(torch.device("cpu")) is False
        utils._use_triton = lambda device: True
    model, processor = load(folder, case)
    ids, pixels, rewards = draw_inputs(case, PROMPTS)
    rows = trl_rows(ids, pixels)
    if pixels is None:
        assert processor([row["prompt"] for row in rows])["input_ids"] == ids.tolist()
    else:
        processor = ReadyImages(processor, ids, pixels)

    def reward(completion_ids, **_):
        assert [len(answer) for answer in completion_ids] == [case["C"]] * rewards.numel()
        return rewards.flatten().tolist()
    rows_of_step, on_gpu = PROMPTS * case["G"], device_of(case) == "cuda"
    rows_at_once = case.get("rows", rows_of_step)
    config = GRPOConfig(
        max_steps=1 + case["steps"], per_device_train_batch_size=rows_at_once,
        gradient_accumulation_steps=rows_of_step // rows_at_once,
        num_generations=case["G"], max_completion_length=case["C"], temperature=1.0, top_k=0,
        top_p=1.0, beta=BETA, loss_type="grpo", learning_rate=LR, lr_scheduler_type="constant",
        gradient_checkpointing=False, bf16=on_gpu, use_cpu=not on_gpu, shuffle_dataset=False,
        output_dir=f"{folder}/trl", report_to="none", logging_strategy="no", save_strategy="no",
        disable_tqdm=True)
    trainer = GRPOTrainer(model, reward, config, Dataset.from_list(rows * config.max_steps),
                          processing_class=processor)
    watch = Stopwatch(trainer.model, trainer.ref_model, case.get("count", False))

    class Steps(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            watch.start()

        def on_step_end(self, *_, **__):
            watch.stop()
    trainer.add_callback(Steps)
    trainer.train()
    return watch


def peak_gb():
    """Of this process; of its tensors on the GPU, if it uses one. Not ru_maxrss: a process inherits
    that of its parent, and keeps it."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def measure(who, case, folder):
    """-> what this program prints"""
    torch.manual_seed(0)
    if who in ("trl", "trl-answers"):
        watch = run_trl(case, folder, who == "trl-answers")
    else:
        watch = run({"ours": Ours, "naive": Naive}[who](case), case, folder)
    gflop = watch.counter.get_total_flops() / 1e9
    return {"steps": watch.steps[1:], "gflop": gflop, "peak_gb": peak_gb()}


def main():
    who, case, folder = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    print(json.dumps(measure(who, case, folder)))


if __name__ == "__main__":
    main()
