"""
How a model is run token by token behind a cache, and what its tokens may see. Nothing here is about
RL: that is sample_group() in the stages, which samples by this Decoder. (Stage 0 judges by
transformers' generate(), with a cache of its own.)

    masks      a 4-D mask for each kind of layer                                 layer_masks
    attention  of grouped queries without copies of the keys                     grouped_attention
               of a prompt's answers, not compared with each other               packed_attention
    cache      with room for the tokens to come                                  RoomyLayer
    speed      on a GPU, a token as one CUDA graph                               Decoder

Shapes: B prompts with an unfinished answer, A columns (as many answers as the prompt with most has
unfinished), L tokens in the cache, V vocabulary.
"""

import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import common  # which imports this file: its names are there when the functions run
import sharding

ATTENTION = "grouped"  # attn_implementation of what common.load() loads
# Tokens of the answers to a prompt from which a GPU attends in two calls, whose many small kernels
# must be launched. A guess between two measurements of a layer (H100, 16 heads, P 1500): 3.1 ms
# against 2.5 in one call with 2,400 tokens, 5.0 against 9.6 with 7,200
TWO_CALLS_FROM = 5000


def layer_masks(model, sees, positions, key_positions=None, answers=None):
    """What tokens may see [b, 1, Q, L] and their positions [b, Q], those of the keys [b, L] if they
    are not the same -> attention mask for the model. A 4-D mask is taken as it is, so that a layer
    with a sliding window (Gemma 3, Mistral) would lose its window: it gets a mask of its own, in
    which what is `sliding_window` positions back is gone. `answers` [b][G]: those that pack() put
    behind the prompts; layers without a window need not compare them with each other, which pays
    if they are long."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if kinds - {"full_attention", "sliding_attention"}:
        raise SystemExit(f"{config.model_type}: layers of type {', '.join(sorted(kinds))} are not "
                         "supported, only full and sliding-window attention.")
    if window is None or kinds == {"full_attention"}:
        if answers is not None:
            sees.answers = answer_places(answers, sees)
        return sees
    if positions.dim() == 3:
        raise SystemExit(f"{config.model_type}: sliding windows are not supported for Qwen-VL.")
    if key_positions is None:
        key_positions = positions
    near = positions[:, None, :, None] - key_positions[:, None, None, :] < window
    if not kinds:  # all layers slide, and the model wants one mask
        return sees & near
    return {"full_attention": sees, "sliding_attention": sees & near}


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """PyTorch's attention, as transformers calls it: query [b, heads, Q, dim], keys and values
    [b, heads/r, L, dim], mask [b, 1, Q, L] -> [b, Q, heads, dim]. Two cases are ours."""
    if getattr(attention_mask, "answers", ()) and not kwargs.get("dropout"):
        return packed_attention(module, query, key, value, attention_mask, scaling, **kwargs), None
    decodes = query.shape[2] < key.shape[2] and attention_mask is not None
    if decodes and query.shape[1] > key.shape[1]:
        mask = for_each_head(attention_mask, query, key)
        return grouped_attention(query, key, value, mask, scaling).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                  **kwargs)


def grouped_attention(query, key, value, mask, scaling):
    """r heads of the query share keys and values, as in most models: query [b, heads, Q, dim]
    becomes [b, heads/r, r*Q, dim], r times as many tokens of each head of keys. Else transformers
    repeats all keys and values r times, in every step. The mask is [b, 1, r*Q, L], by
    for_each_head(). -> [b, Q, heads, dim]"""
    b, heads, length, dim = query.shape
    r = heads // key.shape[1]
    out = F.scaled_dot_product_attention(query.reshape(b, heads // r, r * length, dim), key, value,
                                         attn_mask=mask, scale=scaling)
    return out.reshape(b, heads, length, dim).transpose(1, 2)


def for_each_head(mask, query, key):
    """[b, 1, Q, L] -> [b, 1, r*Q, L] for the r heads of the query that share keys"""
    return mask.repeat(1, 1, query.shape[1] // key.shape[1], 1)


def answer_places(answers, sees):
    """The answers [b][G] behind their prompts, and pack()'s mask [b, 1, L, L] -> for each answer,
    as a row of its own: which of all b*L tokens are its own [b*G, C], C the longest answer (past
    its end, its last token again), and what they see of [prompt | answer], [b*G, 1, C, P+C]; and
    the way back, for the S places behind each prompt which of those b*G*C tokens they are [b*S];
    and is_causal(). () where one call is faster, or the mask shows answers to each other."""
    group_size = max(len(group) for group in answers)
    longest = max(len(answer) for group in answers for answer in group)
    behind = max(sum(len(answer) for answer in group) for group in answers)            # S
    if sees.device.type != "cpu" and behind < TWO_CALLS_FROM:
        return ()
    length, t = sees.shape[3], torch.arange(longest)
    prompt = length - behind
    columns = torch.full((len(answers), group_size, longest), prompt)                  # in L
    real = torch.zeros(columns.shape, dtype=torch.bool)
    back = torch.zeros(len(answers), behind, dtype=torch.long)
    for i, group in enumerate(answers):
        at = prompt
        for g, answer in enumerate(group):
            n = len(answer)
            columns[i, g], real[i, g] = at + t.clamp(max=n - 1), t < n
            back[i, at - prompt:at - prompt + n] = (i * group_size + g) * longest + t[:n]
            at += n
    first = length * torch.arange(len(answers))[:, None, None]      # tokens of the rows before
    places, back = (first + columns).flatten(0, 1).to(sees.device), back.flatten().to(sees.device)
    columns = columns.flatten(0, 1)[:, None].expand(-1, longest, -1).to(sees.device)
    rows = sees.flatten(0, 2)[places]                                               # [b*G, C, L]
    own = rows.gather(2, columns).tril()                                            # [b*G, C, C]
    seen = torch.cat([rows[..., :prompt], own], 2)                                  # [b*G, C, P+C]
    if is_more(rows, seen, real.flatten(0, 1).to(sees.device)):
        return ()
    return places, seen[:, None], back, is_causal(sees, prompt)


def is_more(rows, seen, real):
    """Does a real token see more than its prompt and its own answer? Whoever changes pack()'s mask
    must find that it counts."""
    return bool(rows[real].sum() > seen[real].sum())


def is_causal(sees, prompt):
    """Does each token of the prompts see all that is before it, and no more? False where one of
    them is padded."""
    triangle = torch.ones(prompt, prompt, dtype=torch.bool, device=sees.device).tril()
    return bool((sees[:, 0, :prompt, :prompt] == triangle).all())


def packed_attention(module, query, key, value, mask, scaling, **kwargs):
    """Attention over [prompt | answer 1 | ... | answer G] in two calls: the prompt to itself, then
    each answer, as a row of its own, to the prompt and to itself. One call with pack()'s mask would
    also compare every answer with every other, of which nothing is used: at G 8 most of the work.
    -> [b, L, heads, dim]"""
    places, sees, back, causal = mask.answers
    prompt = query.shape[2] - len(back) // len(query)
    if not hasattr(mask, "numbers"):  # the first layer makes them for all of its forward
        # Causal prompts need none: told so, PyTorch does half the work.
        # The type is value's: under autocast query and key may still be fp32
        of_prompt = None if causal else as_numbers(mask[:, :, :prompt, :prompt], value.dtype)
        mask.numbers = of_prompt, as_numbers(for_each_head(sees, query, key), value.dtype)
    of_prompt, of_answers = mask.numbers                    # [b, 1, P, P], [b*G, 1, r*C, P+C]

    def rows(x):  # [b, heads, L, dim] -> those of the answers [b*G, heads, C, dim]
        tokens = x.transpose(1, 2).flatten(0, 1)                               # [b*L, heads, dim]
        # (gather would keep x for the backward pass)
        return tokens.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)

    def behind_prompt(x):  # -> [b*G, heads, P + C, dim]
        return torch.cat([x[:, :, :prompt].repeat_interleave(len(places) // len(x), 0), rows(x)], 2)

    kwargs["is_causal"] = True  # where there is no mask
    first, _ = sdpa_attention_forward(
        module, query[:, :, :prompt], key[:, :, :prompt], value[:, :, :prompt], of_prompt,
        scaling=scaling, **kwargs)                                             # [b, P, heads, dim]
    answers = grouped_attention(rows(query), behind_prompt(key), behind_prompt(value), of_answers,
                                scaling)                                     # [b*G, C, heads, dim]
    answers = answers.flatten(0, 1).index_select(0, back)                    # [b*S, heads, dim]
    return torch.cat([first, answers.unflatten(0, (len(first), -1))], 1)


def as_numbers(mask, dtype):
    """0 where True, -inf where False. Given True and False, PyTorch makes these numbers itself, but
    in each layer anew, and each layer keeps its own for the backward pass."""
    return mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def refuse_other_attention(model):
    """PyTorch's attention has no soft cap (Gemma 2) and no sinks (gpt-oss): it would leave them out
    in silence. transformers refuses "sdpa" for such models, but not a name that is new to it."""
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        capped = getattr(part.config, "attn_logit_softcapping", None)  # 5.17 lets it pass, too
        if capped or not part._supports_sdpa:
            raise SystemExit(f"{part.config.model_type}: its attention cannot be computed by "
                             "scaled_dot_product_attention, so it is not supported. Take another "
                             "model, as InternVL3.5 or Qwen3.")


def new_cache(most):
    """An empty cache that will hold `most` tokens."""
    return Cache(layer_class_to_replicate=partial(RoomyLayer, most))


class RoomyLayer(DynamicLayer):
    """A layer of the cache, [B, heads, tokens, dim], that leaves room for the tokens to come. Plain
    DynamicLayer concatenates, so every new token copies all tokens before it."""

    def __init__(self, most):
        super().__init__()
        self.most = most    # tokens there will be
        self.slots = None   # [A] places of new tokens in the room, on the device: for a CUDA graph

    def update(self, keys, values, *args, **kwargs):
        keys = keys.to(values.dtype)  # under autocast rotary positions leave them in fp32
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        if self.slots is not None:
            return (with_room(self.keys).index_copy_(2, self.slots, keys),
                    with_room(self.values).index_copy_(2, self.slots, values))
        self.keys, self.values = self.extend(self.keys, keys), self.extend(self.values, values)
        return self.keys, self.values

    def extend(self, old, new):
        (n, heads, length, dim), end = old.shape, old.shape[2] + new.shape[2]
        if length == 0 or end > room(old):  # 0: the memory of the first keys, not ours
            tokens = max(end, min(self.most, end + end // 2))
            roomy = new.new_zeros(n, heads, tokens, dim)  # a graph multiplies them by 0: no NaN
            roomy[:, :, :length] = old
            old = roomy
        extended = with_room(old, end)
        extended[:, :, length:] = new
        return extended


def room(tensor):
    """How many tokens its memory can hold: the share of one head."""
    return tensor.stride(1) // tensor.stride(2)


def with_room(tensor, tokens=None):
    """The same memory with so many tokens; None: with all that it has room for."""
    n, heads, _, dim = tensor.shape
    return tensor.as_strided((n, heads, tokens or room(tensor), dim), tensor.stride())


class Decoder:
    """Runs a token of each answer behind the cache of a prompt.

    On a GPU the two thousand kernels of a token are launched one by one, which takes longer than
    their work (InternVL3.5-1B on an H100: 40 ms, 7 of them work). So as long as shapes and the room
    of the cache stay, they are recorded once as a CUDA graph and then launched together. What the
    graph reads and writes stays in its place: inputs are copied there, masks cover the whole room.
    """

    def __init__(self, model, most):
        """`most`: tokens that the cache will hold, of a prompt and its answers together."""
        self.model, self.cache = model, new_cache(most)
        self.device = next(model.parameters()).device
        # a sharded model may do more than launch kernels
        self.records = self.device.type == "cuda" and not sharding.is_sharded(model)
        self.shape, self.replay = None, None

    def __call__(self, token, masks, position):
        """token [B, A], their masks [B, 1, A, L] as layer_masks() gives them, position [B, A]
        (Qwen-VL: [3, B, A]) -> logits [B, A, V], there until the next call"""
        end = self.cache.get_seq_length() + token.shape[1]
        if not self.records or self.shape != (token.shape, self.room()) or end > self.room():
            logits = self.run(token, masks, position)
            self.shape, self.replay = (token.shape, self.room()), None
            return logits
        self.fill(token, masks, position, end)
        if self.replay is None:
            try:
                self.replay = record(self.run_in_place)
            except RuntimeError as e:
                reason = str(e).splitlines()[0]
                warnings.warn(f"decoding without a CUDA graph, slower: {reason}. If memory is "
                              "short, lower --rollout_batch or --eval_batch.", stacklevel=2)
                self.records = False
                self.write_at(None)
                return self.run(token, masks, position)
        self.replay()
        for layer in self.cache.layers:  # the graph has written them
            layer.keys, layer.values = with_room(layer.keys, end), with_room(layer.values, end)
        self.write_at(None)
        return self.logits

    def run(self, token, masks, position):
        with common.autocast(self.device):
            dtype = self.model.dtype
            if torch.is_autocast_enabled(self.device.type):
                dtype = torch.get_autocast_dtype(self.device.type)
            masks = tree_map(lambda mask: as_numbers(mask, dtype), masks)
            return self.model(input_ids=token, attention_mask=masks, position_ids=position,
                              past_key_values=self.cache, use_cache=True).logits

    def room(self):
        return room(self.cache.layers[0].keys)

    def fill(self, token, masks, position, end):
        """Put the inputs where the graph reads them, or make the place."""
        if isinstance(masks, dict):
            masks = {kind: self.over_room(mask) for kind, mask in masks.items()}
        else:
            masks = self.over_room(masks)
        slots = torch.arange(end - token.shape[1], end, device=self.device)
        inputs = [token, masks, position, slots]
        if self.replay is None:
            self.inputs = tree_map(torch.clone, inputs)
        else:
            tree_map(torch.Tensor.copy_, self.inputs, inputs)
        self.write_at(self.inputs[3])

    def over_room(self, mask):
        return F.pad(mask, (0, self.room() - mask.shape[-1]))  # False

    def write_at(self, slots):
        for layer in self.cache.layers:
            layer.slots = slots

    def run_in_place(self):
        self.logits = self.run(*self.inputs[:3])


def record(function):
    """-> a function that launches all that `function` does on the GPU, at once. `function` is run
    once before, so that nothing is set up while it is recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
