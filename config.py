"""Every knob of wellposed on one page.

The sections below are frozen pydantic models: a value is checked once, when the config is made, and never
changes afterwards. The docstring under a field is what ``python train.py --help`` prints. Nothing heavy is
imported here, so that help and errors come at once.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

Rate = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
LEAST_SHARE = 1e-4  # of a source in a mixture
# [fraction of the run, value] pairs, joined by straight lines: the first step is at fraction 0, the last one at 1.
Points = list[tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0)]]]


class BadInput(Exception):
    """A user's mistake: the message names the thing, the place and the way out. Exit code 2, no traceback."""


class Failure(Exception):
    """What a run met and could not go on with, no mistake of the user. Exit code 4, no traceback."""


def all_errors(problem: ValidationError) -> str:
    """What pydantic found wrong, all in one line: each place and what is the matter there."""
    return "; ".join(" ".join([*map(str, error["loc"]), error["msg"]]) for error in problem.errors())


def check_points(knob: str, points: Points) -> None:
    """Raise ValueError unless the fractions rise from 0 to 1."""
    fractions = [fraction for fraction, _ in points]
    if fractions != sorted(fractions) or {0, 1} - {*fractions[:1], *fractions[-1:]}:
        shown = ", ".join(f"{fraction:g}" for fraction in fractions)
        raise ValueError(
            f"{knob}: the fractions of the run must begin with 0, rise (twice the same is a jump) and end with 1; they "
            f"are [{shown}], and should be as in [[0,1],[0.5,1],[1,0]]"
        )


def value_at(points: Points, fraction: float) -> float:
    """The value at a fraction of the run, from 0 to 1, on the straight line between its neighbours.

    Where two points have the same fraction the value jumps, and the later one holds there.
    """
    following = bisect_right(points, fraction, key=lambda point: point[0])
    if following == len(points):
        return points[-1][1]
    (start, before), (end, after) = points[following - 1], points[following]
    return before + (after - before) * (fraction - start) / (end - start)


class Section(BaseModel):
    """What all sections share: unknown keys, infinities, and ``true`` in place of a number are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        annotation = cls.model_fields[name].annotation
        if isinstance(value, bool) and annotation is not bool:
            # YAML reads a bare `on` as true; for a field whose choices are words the word was meant.
            choices = [choice for part in (annotation, *get_args(annotation)) for choice in get_args(part)]
            word = "on" if value else "off"
            if word in choices:
                return word
            raise ValueError(f"a truth value ({str(value).lower()}) is not accepted here; quote a word")
        return value


class Run(Section):
    """Where and on what a run happens."""

    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._,=+-]*$", max_length=120)
    """Directory of the run under run.dir. null: short words and a hash of the config, which finds its run again."""
    dir: str = Field("runs", min_length=1)
    """Directory that holds the runs."""
    seed: int = Field(0, ge=0)
    """Seed of initialisation, data order and every random regularizer. The data split never follows it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda if there is one, else mps, else cpu."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of matrix products; weights and moments stay in fp32. auto: bf16 on GPUs, with AMX and with AMD's AVX512-BF16.
    fp16, with a scaled loss: auto on CUDA devices without bf16 (T4, V100)."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. auto: on for GPUs, and for runs on CPUs that will take ten minutes or more; in a study, for runs
    of a minute or more that take ten together."""
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    """CPU threads of one process. auto: the cores srun bound it to, or all, shared by the processes of this machine."""
    shard: Literal["none", "node", "all"] = "none"
    """With several processes, what each holds of the model: all of it (none, the fastest), or a part of its weights,
    gradients and moments. node shares them out between the processes of a machine, all between all (torch's FSDP2)."""
    profile: int = Field(0, ge=0)
    """Trace so many steps, from the fifth of a start on, into runs/<name>/profile.json for trace viewers. 0: none."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint of this run. never: move what is there aside and start afresh."""
    init_from: str | None = None
    """Start from these weights: a run directory, one of its checkpoints, or a Hugging Face directory."""
    branch_from: str | None = None
    """Go on from this run (its newest checkpoint, or the one given) as a new run with the same data, model and seed,
    with its weights, moments and place in the data, and a schedule, length and regularizers of its own."""
    teachers: list[str] = []
    """regularizers.distillation_weight: finished runs (of which the best checkpoint is taken), checkpoints, or an
    ensemble.json, whose mean prediction is learnt from, as in [runs/a,runs/b]."""

    @model_validator(mode="after")
    def _consistent(self) -> Run:
        if self.init_from is not None and self.branch_from is not None:
            raise ValueError("run.init_from and run.branch_from exclude each other; set one of them to null")
        return self


class Source(Section):
    """One text of a mixture."""

    path: str = Field(min_length=1)
    """As data.path."""
    weight: float = Field(1.0, gt=0)
    """Of all windows it gives this share, over the sum of all weights."""
    epochs: float | None = Field(None, gt=0)
    """After so many passes it is left out, and the others share its weight. null: it is read as often as it takes."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=40)
    """What its numbers are called, as in val/NAME/loss. null: the last word of the path that says something."""


class Data(Section):
    """The text, its tokens, and the order in which they are seen."""

    corpus: Literal["auto", "stdlib", "text", "tokens", "huggingface"] = "auto"
    """stdlib: the source of Python's own standard library. text: your files. tokens: nanoGPT's, llm.c's or Megatron's
    .bin, with their data.tokenizer. huggingface: a dataset, by name or as `datasets` saved it. auto: what data.path
    is; without one, stdlib."""
    path: str | None = None
    """A file or a glob such as 'books/*.txt' (text; .jsonl, .json, .csv, .tsv and .parquet have fields; .gz, .bz2, .xz
    or .zst may follow), an address (s3://, gs://, hf://, https://), a dataset's name or directory, or a corpus that is
    prepared already, such as corpora/books-0123456789ab, whose text is not needed any more."""
    sources: list[Source] = []
    """A mixture, in place of data.path: [{path: a, weight: 0.7}, {path: b, weight: 0.3, epochs: 4, name: b}]. Windows
    of all are interleaved by weight; all other knobs of data hold for each. A bpe is trained on all together."""
    subset: str | None = None
    """huggingface: the dataset's configuration."""
    source_split: str = "train"
    """huggingface: the split that is read; our own splits are made from it."""
    text_field: str = Field("text", min_length=1)
    """The field (JSON key, column) that holds the text."""
    document: Literal["auto", "file", "line", "field"] = "auto"
    """What one document is. auto: a field where rows have fields (JSON, CSV, Parquet, datasets), else a file."""
    separator: str | None = Field(None, min_length=1)
    """Plain text: what stands between two documents of a file, such as <|endoftext|>. null: a file is a document."""
    streaming: bool = False
    """huggingface: read without downloading the whole dataset first."""
    max_documents: int | None = Field(None, ge=1)
    """Read at most this many documents."""
    min_characters: int = Field(0, ge=0)
    """Leave out documents that have fewer, outer white space not counted."""
    copies: Literal["keep", "drop", "drop_near"] = "keep"
    """drop: documents of train leave it that are in val or test, too, but for outer white space. drop_near: also those
    of which nearly all five-word sequences are (MinHash, Jaccard 0.8; needs datasketch). keep: they are counted."""
    transform: str | None = Field(None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """module:function applied to the text of each document at preparation; it returns a text or a list of texts."""
    tokenizer: str = Field("bpe", min_length=1)
    """byte, bpe (trained on the training split), or a tokenizer.json, a directory with one, or a hub name."""
    vocab_size: int = Field(4096, ge=257, le=2**20)
    """Entries of a trained bpe tokenizer, the end-of-text token included."""
    tokenizer_sample: int = Field(10**9, ge=1)
    """Characters of the training split, drawn evenly over it, that a bpe tokenizer is trained on."""
    split: Literal["auto", "documents", "tail"] = "auto"
    """documents: each document falls into a split by its hash. tail: the end of the text is held out.
    auto: tail for fewer than 100 files of text, else documents."""
    val_fraction: float = Field(0.05, gt=0, lt=1)
    """Share held out for validation, unless val_path or val_split gives its text."""
    val_path: str | None = None
    """What to validate on, given as data.path gives the rest; null: a share of that."""
    val_split: str | None = None
    """A dataset's own split to validate on, such as validation; null: a share of source_split."""
    test_fraction: float = Field(0.05, ge=0, lt=1)
    """Share held out for the test, looked at once, at the end."""
    train_tokens: int | None = Field(None, ge=2)
    """Train on only the first so many tokens (to study scarce data)."""
    shuffle: Literal["windows", "documents"] = "windows"
    """What is permuted anew each epoch: windows of the token stream, or whole documents, each among a thousand
    neighbours, and then windows."""
    isolate_documents: bool = False
    """No token attends to another document; positions restart in each."""

    @model_validator(mode="after")
    def _consistent(self) -> Data:
        if self.corpus == "stdlib" and self.path:
            raise ValueError(f"data.corpus=stdlib reads no data.path, and it is {self.path}; leave one of them out")
        if self.sources:
            least = min(source.weight for source in self.sources) / sum(source.weight for source in self.sources)
            if self.path or self.corpus != "auto":
                raise ValueError("data.sources takes the place of data.path; leave that out, and data.corpus at auto")
            if least < LEAST_SHARE:
                raise ValueError(
                    f"data.sources: a share of {least:g} of all windows is below {LEAST_SHARE:g}; leave that source out"
                )
        if self.corpus not in ("auto", "stdlib") and not self.path:
            what = "files or a glob" if self.corpus == "text" else "the dataset's name"
            raise ValueError(f"data.corpus={self.corpus} needs data.path ({what})")
        if self.separator is not None and self.document != "auto":
            raise ValueError("data.separator says what a document is; leave data.document at auto")
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("data.val_fraction + data.test_fraction must leave something to train on (be below 1)")
        return self


class Model(Section):
    """The network."""

    family: Literal["gpt2", "llama", "qwen3"] = "llama"
    """The Hugging Face architecture that the weights load into. gpt2: LayerNorm, learned positions, GELU.
    llama: RMSNorm, rotary positions, SwiGLU. qwen3: llama with normalised queries and keys."""
    n_layers: int = Field(4, ge=1, le=1000)
    """Transformer blocks."""
    d_model: int = Field(256, ge=2)
    """Width of the residual stream."""
    n_heads: int = Field(4, ge=1)
    """Query heads."""
    n_kv_heads: int | None = Field(None, ge=1)
    """Key and value heads (grouped-query attention). null: as many as n_heads."""
    head_dim: int | None = Field(None, ge=2)
    """Width of a head. null: d_model / n_heads."""
    d_ff: int | None = Field(None, ge=1)
    """Hidden width of the MLP. null: 4 d_model for gpt2, else 8/3 d_model rounded up to a multiple of 64."""
    context_length: int = Field(256, ge=2)
    """Tokens of a training window, and the longest context the model can use."""
    tie_embeddings: bool = True
    """The output matrix is the embedding matrix (Press & Wolf 2017)."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary positions (llama, qwen3)."""
    norm_eps: float = Field(1e-5, gt=0, le=0.1)
    """Added to the variance in every norm."""
    checkpoint_activations: Literal["none", "attention", "block"] = "none"
    """What a training step does not keep but computes again on the way back, with the same random numbers: less memory
    for more time (Chen 2016, 1604.06174). attention: that branch. block: everything between the inputs of blocks, which
    costs a third of a step. The network and its gradients stay what they are."""

    @model_validator(mode="after")
    def _consistent(self) -> Model:
        if self.head_dim is None and self.d_model % self.n_heads:
            sizes = f"model.d_model={self.d_model} is not divisible by model.n_heads={self.n_heads}"
            raise ValueError(f"{sizes}; change one of them or give model.head_dim")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"model.n_heads={self.n_heads} is not a multiple of model.n_kv_heads={self.n_kv_heads}")
        if self.family == "gpt2" and (self.kv_heads != self.n_heads or self.head_width * self.n_heads != self.d_model):
            raise ValueError("model.family=gpt2 has neither grouped heads nor its own head_dim; leave both null")
        if self.family == "llama" and self.d_model % self.n_heads:
            raise ValueError(
                f"model.d_model={self.d_model} is not divisible by model.n_heads={self.n_heads}: transformers cannot "
                "load such a llama, even with its own head_dim; change one of them, or take model.family=qwen3"
            )
        if self.family != "gpt2" and self.head_width % 2:
            raise ValueError(f"rotary positions need an even head width; it is {self.head_width}")
        return self

    @property
    def kv_heads(self) -> int:
        """Key and value heads, the null resolved."""
        return self.n_kv_heads or self.n_heads

    @property
    def head_width(self) -> int:
        """Width of one head, the null resolved."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def hidden_width(self) -> int:
        """Hidden width of the MLP, the null resolved."""
        if self.d_ff:
            return self.d_ff
        return 4 * self.d_model if self.family == "gpt2" else -(-8 * self.d_model // 3 // 64) * 64


class Optimizer(Section):
    """How gradients become updates."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw for all tensors, or muon for the matrices of the blocks and adamw for the rest (torch.optim)."""
    lr: float = Field(2e-3, gt=0)
    """Peak learning rate of AdamW."""
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's mean and square."""
    eps: float = Field(1e-8, gt=0)
    """Added to AdamW's denominator."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest norm of the whole gradient; 0: no clipping."""
    matrix_lr: float = Field(0.02, gt=0)
    """Muon's peak learning rate; it follows the same schedule as lr."""
    matrix_momentum: float = Field(0.95, ge=0, lt=1)
    """Muon's Nesterov momentum."""


class Schedule(Section):
    """The learning rate over the run, a pure function of the step."""

    name: Literal["warmup_cosine", "cosine", "one_cycle", "wsd", "constant", "points"] = "warmup_cosine"
    """wsd: warm up, stay, decay at the end. one_cycle: cosine up over warmup_steps, cosine down. constant warms up and
    stays; points: as schedule.points says. cosine and points ignore warmup_steps."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of linear warmup, fewer than the run has. null: the smaller of 100 and a tenth of the run."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """The last learning rate, as a share of the peak."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """wsd: the share of the run over which the learning rate decays."""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """wsd: along a line, or as 1 - sqrt(x), first fast and then slowly (Haegele 2024, 2405.18392)."""
    points: Points | None = None
    """name=points: [fraction of the run, multiple of the peak] pairs joined by straight lines, as in
    [[0,0.01],[0.1,1],[1,0]]; the first step is at 0, the last at 1; twice the same fraction is a jump."""

    @model_validator(mode="after")
    def _consistent(self) -> Schedule:
        if (self.name == "points") != (self.points is not None):
            way = "give both, as in --schedule.name=points --schedule.points=[[0,0.01],[0.1,1],[1,0]], or neither"
            raise ValueError(f"schedule.name=points and schedule.points need each other; {way}")
        if self.points is not None:
            check_points("schedule.points", self.points)
        return self


def knob(default: Any, kind: str, typical: Any, off: Any = 0, **limits: Any) -> Any:
    """A knob of the regularizers section: where it acts, a typical value, and the value at which it is absent.

    Kinds: input, activation, objective, weights, average, stopping, modifier (changes how another knob acts).
    The laws in tests/laws walk over the section by these.
    """
    return Field(default, json_schema_extra={"kind": kind, "typical": typical, "off": off}, **limits)


class Regularizers(Section):
    """What keeps the model from fitting noise. Everything is off by default except weight decay."""

    embedding_dropout: float = knob(0.0, "activation", typical=0.1, ge=0, lt=1)
    """Dropout of the embedding sum, before block 1 (Srivastava 2014). Like all: on repeated data, not in one epoch."""
    attention_dropout: float = knob(0.0, "activation", typical=0.1, ge=0, lt=1)
    """Dropout of the attention weights, after the softmax (tensor2tensor, GPT-2)."""
    residual_dropout: float = knob(0.0, "activation", typical=0.1, ge=0, lt=1)
    """Dropout of what attention and MLP add to the residual stream (Vaswani 2017)."""
    mlp_dropout: float = knob(0.0, "activation", typical=0.1, ge=0, lt=1)
    """Dropout of the hidden activation of the MLP (Srivastava 2014)."""
    stochastic_depth: float = knob(0.0, "activation", typical=0.1, ge=0, lt=1)
    """Drops whole residual branches, for each sequence: this rate in the last block, falling linearly to 0 in the
    first (Huang 2016). For deep models on repeated data."""
    dropout_from: float = knob(0.0, "modifier", typical=0.5, ge=0, lt=1)
    """Every dropout, token_dropout and stochastic_depth act only from this fraction of the run on: late dropout
    (Liu 2023, 2303.01500)."""
    dropout_until: float = knob(1.0, "modifier", typical=0.5, off=1.0, gt=0, le=1)
    """They act only up to this fraction of the run: early dropout, against underfitting (Liu 2023)."""
    token_dropout: float = knob(0.0, "input", typical=0.1, ge=0, lt=1)
    """Drops the embeddings of whole positions; targets stay (Iyyer 2015, Bowman 2016)."""
    token_replacement: float = knob(0.0, "input", typical=0.1, ge=0, lt=1)
    """Input ids become random ones at this rate; targets stay (SwitchOut, Wang 2018). Data augmentation."""
    embedding_noise: float = knob(0.0, "input", typical=5.0, ge=0)
    """Adds uniform noise of this alpha / sqrt(context * width) to the embeddings (NEFTune, Jain 2023: 5 to 15)."""
    mixup_alpha: float = knob(0.0, "input", typical=0.2, ge=0)
    """Mixes the embeddings and the losses of pairs of sequences, shares from Beta(alpha, alpha) (Zhang 2018)."""
    reversed_fraction: float = knob(0.0, "input", typical=0.5, ge=0, lt=1)
    """This share of sequences is read and predicted from right to left; a trained vector, added to their embeddings,
    says so (arXiv 2606.16246: half of them). For data repeated many times."""
    target_offset: int = knob(1, "input", typical=5, off=1, ge=1)
    """Predict the token i ahead, i from 1 to this, drawn for each sequence in proportion to exp(-i); a trained vector
    for each i above 1, added to the embeddings, says so (arXiv 2606.16246: up to 5). For data repeated many times."""
    label_smoothing: float = knob(0.0, "objective", typical=0.1, ge=0, lt=1)
    """The target keeps 1 - this, the other tokens share it evenly (Szegedy 2016, fairseq's convention). Improves
    calibration of overconfident models."""
    z_loss: float = knob(0.0, "objective", typical=1e-4, ge=0)
    """Times the mean squared log-partition of the logits (PaLM 2022: 1e-4). Steadies training at high rates."""
    entropy_penalty: float = knob(0.0, "objective", typical=0.1, ge=0)
    """Times the mean entropy of the output, which is rewarded (Pereyra 2017). Against overconfidence."""
    multi_token_weight: float = knob(0.0, "objective", typical=0.3, ge=0)
    """Times the cross-entropy of the token after next, predicted through a trained matrix that is not exported
    (Gloeckle 2024; 0.3 in DeepSeek-V3). Said to help on scarce data; small models may lose."""
    masked_input_weight: float = knob(0.0, "objective", typical=0.4, ge=0)
    """Times the cross-entropy of a second pass, in which a trained vector takes the place of some input embeddings
    (arXiv 2606.06888: 0.4). For data repeated many times; a step takes about twice the time."""
    masked_input_rate: float = knob(0.5, "modifier", typical=0.3, off=0.5, gt=0, le=1)
    """The share of replaced embeddings is drawn for each sequence, evenly between 0 and this."""
    distillation_weight: float = knob(0.0, "objective", typical=0.5, ge=0, le=1)
    """The target keeps 1 - this, and the mean prediction of run.teachers has the rest (Hinton 2015). Passes on most of
    what an ensemble gains on repeated data (Kim 2025, 2509.14786)."""
    distillation_temperature: float = knob(1.0, "modifier", typical=2.0, off=1.0, gt=0)
    """Divides the logits of both sides where they are compared; the gradient is multiplied by its square."""
    weight_decay: float = knob(0.1, "weights", typical=0.1, ge=0)
    """Decoupled decay: w <- w (1 - lr * this) before each step (Loshchilov & Hutter 2019). Repeated data: 1 to 3."""
    weight_decay_epochs: float | None = knob(None, "weights", typical=5.0, off=None, gt=0)
    """In place of weight_decay: decay by 1 / (peak lr * this * steps per epoch), so that AdamW's weights average its
    updates over this many epochs (Wang & Aitchison 2405.13698). Each optimizer group goes by its own peak, so that all
    have this timescale: Muon's by matrix_lr."""
    weight_decay_schedule: Literal["constant", "linear", "cosine"] | Points = knob(
        "constant", "modifier", typical=[[0.0, 0.8], [0.5, 1.6], [1.0, 0.4]], off="constant"
    )
    """How weight_decay moves to weight_decay_end over the run, or a list of [fraction of the run, weight decay] joined
    by straight lines, which is the weight decay: weight_decay and weight_decay_end are not given then (NanoGPT
    Slowrun 2026)."""
    weight_decay_end: float = knob(0.0, "modifier", typical=0.05, ge=0)
    """The weight decay of the last step, when linear or cosine lead there."""
    cautious_weight_decay: bool = knob(False, "modifier", typical=True, off=False)
    """Decay only the weights that the optimizer's step shrinks anyway (Chen 2025, 2510.12402)."""
    decay_embeddings: bool = knob(True, "modifier", typical=False, off=True)
    """Whether embeddings are decayed too. Norms, biases and gains never are."""
    l1: float = knob(0.0, "weights", typical=1e-5, ge=0)
    """Adds this * sign(w) to the gradient of decayed weights: sparsity (Tibshirani 1996). With l2: elastic net."""
    l2: float = knob(0.0, "weights", typical=1e-4, ge=0)
    """Adds 2 * this * w to the gradient of decayed weights; unlike weight_decay it goes through Adam's scaling."""
    ema_decay: float = knob(0.0, "average", typical=0.999, ge=0, lt=1)
    """Evaluates a moving average of the weights: average <- this * average + (1 - this) * weights (Tarvainen 2017). In
    step t it is at most (1 + t) / (10 + t): a short run's average forgets its beginning, too."""
    swa_start: float | None = knob(None, "average", typical=0.75, off=None, ge=0, lt=1)
    """Evaluates the equal average of the weights from this fraction of the run on (Polyak 1992, Izmailov 2018)."""
    swa_every: int = knob(1, "modifier", typical=10, off=1, ge=1)
    """Steps between the weights that swa_start's average counts."""
    early_stopping_patience: int = knob(0, "stopping", typical=3, ge=0)
    """Stop after this many evaluations in a row without a new best, and restore the best (Prechelt 1998)."""
    early_stopping_min_delta: float = knob(0.0, "modifier", typical=0.01, ge=0)
    """What counts as a new best must be better by more than this."""

    @model_validator(mode="after")
    def _consistent(self) -> Regularizers:
        if self.ema_decay and self.swa_start is not None:
            both = "regularizers.ema_decay and regularizers.swa_start exclude each other (two kinds of average)"
            raise ValueError(f"{both}; set ema_decay to 0 or swa_start to null")
        if self.dropout_from >= self.dropout_until:
            window = f"dropout_from={self.dropout_from:g} must be below dropout_until={self.dropout_until:g}"
            raise ValueError(f"regularizers.{window}; for no dropout at all set the rates to 0")
        if self.distillation_weight and (self.reversed_fraction or self.target_offset > 1):
            what = "teachers predict the next token, from left to right"
            raise ValueError(
                f"regularizers.distillation_weight excludes reversed_fraction and target_offset: {what}; "
                "set reversed_fraction to 0 and target_offset to 1"
            )
        self._check_one_decay()
        return self

    def _check_one_decay(self) -> None:
        """Raise ValueError when the weight decay is said in two ways."""
        said = {}
        default = type(self).model_fields["weight_decay"].default
        if self.weight_decay not in (0, default):
            said["weight_decay"] = f"set it to its default, {default:g}"
        if self.weight_decay_epochs is not None:
            said["weight_decay_epochs"] = "set it to null"
        if not isinstance(self.weight_decay_schedule, str):
            check_points("regularizers.weight_decay_schedule", self.weight_decay_schedule)
            said["weight_decay_schedule"] = "make its list constant, linear or cosine"
            if self.weight_decay_end:
                said["weight_decay_end"] = "set it to 0"
        if len(said) > 1:
            names = " and ".join(f"regularizers.{name}" for name in said)
            ways = "; ".join(f"{name}: {way}" for name, way in said.items())
            raise ValueError(f"{names} exclude each other: each says what the weight decay is. Keep one ({ways})")


class Training(Section):
    """How long, and in which portions."""

    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps of the run. Give this or max_epochs; with neither the run is one epoch long."""
    max_epochs: float | None = Field(None, gt=0)
    """Passes over the training tokens."""
    global_batch_size: int = Field(16, ge=1)
    """Sequences of one optimizer step, over all processes and micro-batches."""
    micro_batch_size: Literal["auto"] | Count | None = None
    """Sequences that go through the model at once on one device. null: the share of each process. auto: the most that
    its memory holds. Both are found when the run begins, by arithmetic, and kept when it goes on."""
    deterministic: Literal["fast", "ordinary", "strict"] = "ordinary"
    """ordinary: a run repeats bit for bit on the same hardware. strict: on any number of processes with equal
    run.threads; costs memory and time. fast: GPUs may choose faster sums that do not repeat; no change on a CPU."""
    hang_timeout: int = Field(600, ge=1)
    """Seconds that a process waits for the others before it stops and names the one that hangs."""
    max_nonfinite: int = Field(10, ge=1)
    """Stop after this many steps in a row whose gradient is not finite; each of them is skipped."""
    max_failed_saves: int = Field(3, ge=1)
    """Stop after this many checkpoints in a row that could not be written (a full disk)."""
    max_attempts: int = Field(5, ge=1)
    """Stop when the run has been started this often from one checkpoint and crashed before the next."""

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.max_steps is not None and self.max_epochs is not None:
            raise ValueError("training.max_steps and training.max_epochs exclude each other; set one of them to null")
        if self.global_batch_size % self.micro_size:
            sizes = f"{self.global_batch_size} is not a multiple of training.micro_batch_size={self.micro_batch_size}"
            raise ValueError(f"training.global_batch_size={sizes}")
        return self

    @property
    def micro_size(self) -> int:
        """Sequences of one micro-batch; of null and auto the most that there can be."""
        size = self.micro_batch_size
        return size if isinstance(size, int) else self.global_batch_size

    def micro_sizes(self, processes: int) -> list[int]:
        """Sizes of micro-batches that so many processes can share, ascending."""
        whole = self.global_batch_size
        return [size for size in range(1, whole + 1) if whole % size == 0 and (whole // size) % processes == 0]

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one optimizer step, over all processes."""
        return self.global_batch_size // self.micro_size


class Evaluation(Section):
    """Validation during the run."""

    every: Literal["epoch"] | Count | None = None
    """Steps between evaluations, or epoch. null: ten over the run. The last step is always evaluated."""
    max_tokens: int | None = Field(2_000_000, ge=2)
    """Evaluate on only the first so many tokens. null: the whole split. The test at the end is of its whole split."""
    batch_size: int | None = Field(None, ge=1)
    """Sequences that are evaluated at once on one device, which changes the result by rounding alone. null: twice
    training.micro_batch_size, for without gradients no block's activations are kept."""
    sample_tokens: int = Field(200, ge=0)
    """Tokens of the sample written to samples.txt at each evaluation; 0: none."""


class Checkpoint(Section):
    """What is kept of a run."""

    every: int | None = Field(None, ge=1)
    """Steps between checkpoints. null: at each evaluation. The best and the last are always saved."""
    minutes: float | None = Field(10, gt=0)
    """A checkpoint is also saved when the last was saved so many minutes ago. null: never for that."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints that are kept beside the best."""
    at: list[int | str] = []
    """Checkpoints that are saved whatever the others are, and kept: after so many steps (1000), tokens (10M; k, M or
    B) or epochs (3epochs), as in [1000,10M,3epochs]."""

    @field_validator("at")
    @classmethod
    def _milestones(cls, milestones: list[int | str]) -> list[int | str]:
        for milestone in milestones:
            if not re.fullmatch(r"0*[1-9]\d*|(?=.*[1-9])\d+(\.\d+)?([kMB]|epochs?)", str(milestone)):
                raise ValueError(f"{milestone!r} is no number of steps (1000), tokens (10M) or epochs (3epochs)")
        return milestones


class Tracking(Section):
    """Where the numbers go. runs/<name>/metrics.jsonl always has them; W&B mirrors it."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if logged in, else disabled; the variable WANDB_MODE wins over auto."""
    project: str = Field("wellposed", min_length=1)
    """W&B project."""
    group: str | None = None
    """W&B group."""
    tags: list[str] = []
    """W&B tags."""
    log_every: int = Field(10, ge=1)
    """Steps between two lines of training metrics."""


class Config(Section):
    """A whole run: what train.py needs to know."""

    run: Run = Run()
    data: Data = Data()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    regularizers: Regularizers = Regularizers()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.regularizers.mixup_alpha and self.data.isolate_documents:
            raise ValueError("regularizers.mixup_alpha excludes data.isolate_documents: mixtures have no documents")
        if self.regularizers.mixup_alpha and self.training.micro_size < 2:
            raise ValueError("regularizers.mixup_alpha mixes pairs: training.micro_batch_size must be at least 2")
        offset, context = self.regularizers.target_offset, self.model.context_length
        if offset >= context:
            sizes = f"regularizers.target_offset={offset} must be below model.context_length={context}"
            raise ValueError(f"{sizes}: a window has no token so far ahead; lower it")
        if bool(self.regularizers.distillation_weight) != bool(self.run.teachers):
            way = "give both, as in --regularizers.distillation_weight=0.5 --run.teachers=[runs/a,runs/b], or neither"
            raise ValueError(f"regularizers.distillation_weight and run.teachers need each other; {way}")
        if self.training.deterministic == "strict" and self.run.shard != "none":
            raise ValueError(
                "training.deterministic=strict adds up whole gradients on each process and excludes "
                f"run.shard={self.run.shard}; set run.shard=none, or training.deterministic=ordinary"
            )
        warmup, steps = self.schedule.warmup_steps or 0, self.training.max_steps
        if self.schedule.name not in ("cosine", "points") and steps is not None and warmup >= steps:
            lengths = f"schedule.warmup_steps={warmup} must be below training.max_steps={steps}"
            raise ValueError(f"{lengths}; lower it, or set it to null for the smaller of 100 and a tenth of the run")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Targets of one optimizer step, over all processes and micro-batches."""
        return self.training.global_batch_size * self.model.context_length

    @property
    def evaluation_batch_size(self) -> int:
        """Sequences that are evaluated at once, the null resolved."""
        return self.evaluation.batch_size or 2 * self.training.micro_size

    def flat(self) -> dict[str, Any]:
        """All knobs as ``{"section.key": value}``, in the order of this page."""
        nested = self.model_dump(mode="json")
        return {f"{section}.{key}": value for section, keys in nested.items() for key, value in keys.items()}
