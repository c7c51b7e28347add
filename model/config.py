"""Sizes and special ids of the decoder and of the vision-language model."""

import math

from transformers import PretrainedConfig

from model.messages import UserError

IGNORE_INDEX = -100  # label of a position that the loss skips
IMAGE_TOKEN = "@"  # one character and one token; a picture is a span of config.image_tokens of them
IMAGE_TOKEN_ID = 34
END_OF_TEXT_ID = 0  # <|endoftext|>, also the padding
START_ID = 1  # <|im_start|>
END_ID = 2  # <|im_end|>, ends every turn and every generation
ROPE_DEFAULT = {"rope_type": "default", "rope_theta": 1e6}
YARN_NUMBERS = ("factor", "original_max_position_embeddings")
YARN_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
LLAMA3_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_NUMBERS = {"default": (), "linear": ("factor",), "llama3": LLAMA3_NUMBERS, "yarn": YARN_NUMBERS}  # by rope_type
BICUBIC = 3  # as Pillow and preprocessor_config.json count filters
CLIP_VIT_B16 = {  # the sizes of openai/clip-vit-base-patch16's vision half
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}


class MiniMindConfig(PretrainedConfig):
    """The decoder's sizes. Defaults are MiniMind2-Small's: 25.83 M parameters.

    The dense decoder is exactly Llama and the MoE decoder exactly Qwen2-MoE, so that exports need no code of ours; with
    qk_norm they are Qwen3 and Qwen3-MoE, with qkv_bias alone Qwen2.
    """

    model_type = "minimind"

    def __init__(
        self,
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 2,
        vocab_size: int = 6400,
        intermediate_size: int | None = None,  # an expert's with use_moe; None: 64 * ceil(int(8/3 * hidden_size) / 64)
        max_position_embeddings: int = 32768,  # tokens
        rope_parameters: dict | None = None,  # over ROPE_DEFAULT; with YaRN see rope_frequencies
        rope_theta: float | None = None,  # short for rope_parameters={"rope_theta": ...}
        rms_norm_eps: float = 1e-5,
        dropout: float = 0.0,
        use_moe: bool = False,
        num_experts: int = 4,
        num_experts_per_tok: int = 2,
        router_aux_loss_coef: float = 0.1,  # weight of the balance loss
        tie_word_embeddings: bool = True,
        head_dim: int | None = None,  # of a query, a key or a value; None: hidden_size / num_attention_heads
        qk_norm: bool = False,  # an RMSNorm for each query and key, as Qwen3 has it
        qkv_bias: bool = False,
        output_bias: bool = False,  # attention's last product has one
        mlp_bias: bool = False,
        norm_topk_prob: bool | None = None,  # weights of the chosen experts sum to 1; None: where there are several
        shared_expert_intermediate_size: int | None = None,  # None: as intermediate_size; 0: no shared expert
        shared_expert_gate: bool = False,  # weigh the shared expert by a gate of its own, as Qwen2-MoE does
        **kwargs,
    ):
        if num_key_value_heads < 1 or num_attention_heads % num_key_value_heads:
            raise UserError(
                f"num_attention_heads {num_attention_heads} must be a multiple of num_key_value_heads "
                f"{num_key_value_heads}"
            )
        if head_dim is None and hidden_size % num_attention_heads:
            raise UserError(
                f"hidden_size {hidden_size} must be a multiple of num_attention_heads {num_attention_heads}, or "
                "head_dim be given"
            )
        head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        if head_dim < 2 or head_dim % 2:
            raise UserError(f"the head size {head_dim} is odd or too small; RoPE turns pairs")
        if use_moe and not 1 <= num_experts_per_tok <= num_experts:
            raise UserError(f"num_experts_per_tok {num_experts_per_tok} is not within 1..num_experts {num_experts}")
        if shared_expert_gate and shared_expert_intermediate_size == 0:
            raise UserError("shared_expert_gate needs a shared expert: shared_expert_intermediate_size is 0")
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.vocab_size = vocab_size
        self.intermediate_size = intermediate_size or 64 * -(-int(8 / 3 * hidden_size) // 64)
        self.max_position_embeddings = max_position_embeddings
        given = kwargs.pop("rope_scaling", None) or rope_parameters or {}  # the first as before transformers 5
        self.rope_parameters = _complete_rope(given, rope_theta, max_position_embeddings)
        self.rms_norm_eps = rms_norm_eps
        self.dropout = dropout
        self.use_moe = use_moe
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.router_aux_loss_coef = router_aux_loss_coef
        self.qk_norm, self.qkv_bias, self.output_bias, self.mlp_bias = qk_norm, qkv_bias, output_bias, mlp_bias
        self.norm_topk_prob = norm_topk_prob
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.shared_expert_gate = shared_expert_gate
        self.use_cache = True
        kwargs.setdefault("bos_token_id", START_ID)
        kwargs.setdefault("eos_token_id", END_ID)
        kwargs.setdefault("pad_token_id", END_OF_TEXT_ID)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def weights_sum_to_one(self) -> bool:
        """Whether the weights of a token's experts are divided by their sum.

        A single one would become 1, and the router would learn from the balance loss alone.
        """
        return self.num_experts_per_tok > 1 if self.norm_topk_prob is None else self.norm_topk_prob

    @property
    def shared_expert_size(self) -> int:
        """Width of the shared expert, 0 where there is none."""
        given = self.shared_expert_intermediate_size
        return self.intermediate_size if given is None else given


def _complete_rope(given: dict, rope_theta: float | None, max_position_embeddings: int) -> dict:
    """The given rope_parameters under today's names, filled up with the defaults. Raises UserError."""
    given = dict(given)
    if old_name := given.pop("type", None):
        given.setdefault("rope_type", old_name)
    if rope_theta is not None and given.setdefault("rope_theta", rope_theta) != rope_theta:
        raise UserError(f"rope_theta {rope_theta} is not that of rope_parameters {given}: give it once")
    if given.keys() - {"rope_theta"} and "rope_type" not in given:
        raise UserError(f"rope_parameters {given} lack their rope_type: {' or '.join(map(repr, ROPE_NUMBERS))}")
    if "original_max_position_embeddings" in ROPE_NUMBERS.get(given.get("rope_type"), ()):
        given.setdefault("original_max_position_embeddings", max_position_embeddings)
    complete = {**ROPE_DEFAULT, **given}
    check_rope(complete)
    return complete


def check_rope(scaling: dict) -> None:
    """Raises UserError where rope_parameters hold what would be ignored in silence, or lack what is needed."""
    kind = scaling.get("rope_type")
    if kind not in ROPE_NUMBERS:
        kinds = " or ".join(map(repr, ROPE_NUMBERS))
        raise UserError(f"rope_parameters {scaling} are not understood: rope_type must be {kinds}")
    known = ROPE_NUMBERS[kind] if kind in ("linear", "llama3") else (*YARN_NUMBERS, *YARN_OPTIONS)
    if unknown := scaling.keys() - {"rope_type", "rope_theta", *known}:
        raise UserError(
            f"rope_parameters hold {', '.join(sorted(unknown))}, which is not known: leave it out, or choose from "
            f"rope_type, rope_theta, {', '.join(known)}"
        )
    for name in ("rope_theta", *ROPE_NUMBERS[kind]):
        value = scaling.get(name)
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise UserError(f"rope_parameters {scaling}: {name} {value} must be a number above 0")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(f"rope_parameters {scaling}: low_freq_factor must be below high_freq_factor")


class VLMConfig(MiniMindConfig):
    """The decoder's sizes, the vision tower's, and where the tower's weights come from."""

    model_type = "minimind_vlm"

    def __init__(
        self,
        vision_config: dict | None = None,  # see model/vision_encoder.py; None: CLIP-ViT-B/16's sizes
        vision_source: str | None = None,  # the tower's folder; None: it came from nowhere and is saved with the model
        vision_sha256: str | None = None,  # of the tower's weights, checked when they are loaded again
        projector: str = "linear",  # a name of model/projectors.py
        image_tokens: int | None = None,  # that a picture takes in the sequence; None: one a patch
        image_token_id: int = IMAGE_TOKEN_ID,  # of the placeholder, by model.tokenizer_files.picture_token
        tiles: int = 0,  # into which a picture is cut at most, see model/views.py; 0: into none
        frames: int = 0,  # of a video that are seen at most; 0: as many as model/views.py says
        **kwargs,
    ):
        self.vision_config = dict(vision_config or CLIP_VIT_B16)
        self.vision_source = vision_source
        self.vision_sha256 = vision_sha256
        self.projector = projector
        self.image_tokens = image_tokens or self.patches_a_side**2
        _ = self.fold  # refuses what cannot be
        self.image_token_id, self.tiles, self.frames = image_token_id, tiles, frames
        super().__init__(**kwargs)

    @property
    def vision_hidden_size(self) -> int:
        return self.vision_config["hidden_size"]

    @property
    def image_size(self) -> int:
        """Pixels per side, square: what the tower is given, which may be another size than it was trained with."""
        return self.vision_config.get("picture_size") or self.vision_config["image_size"]

    @property
    def patches_a_side(self) -> int:
        """14 for CLIP-ViT-B/16."""
        return self.image_size // self.vision_config["patch_size"]

    @property
    def resample(self) -> int:
        """Pillow's number of the filter by which pictures are scaled: the tower's own, or bicubic."""
        return self.vision_config.get("resample", BICUBIC)

    @property
    def before_last_norm(self) -> bool:
        """Whether a SigLIP tower is read before its last norm: as LLaVA's models do, and MiniMind-3V does not."""
        return self.vision_config.get("model_type") == "siglip_vision_model" and self.projector != "norm_mlp"

    @property
    def fold(self) -> tuple[int, int]:
        """Rows and columns of patches that become one token: (2, 2) for 49 tokens of 196, (1, 2) for 98.

        Raises:
            UserError: the patches cannot be folded into so many tokens.
        """
        side = self.patches_a_side
        divisors = [number for number in range(1, side + 1) if side % number == 0]
        folds = [(rows, columns) for rows in divisors for columns in divisors if rows <= columns]
        counts = {side // rows * (side // columns): (rows, columns) for rows, columns in folds}  # the squarest is last
        if self.image_tokens not in counts:
            raise UserError(
                f"image_tokens {self.image_tokens} cannot be made of {side} x {side} patches: "
                f"{', '.join(map(str, sorted(counts, reverse=True)))} can"
            )
        return counts[self.image_tokens]

    @property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of a picture's tokens."""
        rows, columns = self.fold
        return self.patches_a_side // rows, self.patches_a_side // columns

    @property
    def projected_size(self) -> int:
        """Width of what enters the projector's layers."""
        rows, columns = self.fold
        return rows * columns * self.vision_hidden_size
