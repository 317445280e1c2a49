"""Names of torch's operations by how their results depend on what they read; rules are in `label_rules`."""

from __future__ import annotations

MOVES = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "as_strided_copy", "cat", "chunk", "clone",
    "constant_pad_nd", "contiguous", "detach", "diag_embed", "diagonal", "expand", "flip", "lift",
    "lift_fresh", "lift_fresh_copy", "narrow", "permute", "pixel_shuffle", "pixel_unshuffle",
    "repeat", "reshape", "roll", "select", "slice",
    "split", "split_with_sizes", "squeeze", "stack", "t", "transpose", "tril", "triu", "unbind", "unfold",
    "unsqueeze", "view", "view_as", "expand_copy", "movedim", "rot90", "channel_shuffle",
}  # fmt: skip
"""What comes out was somewhere in what went in; the same call on labels moves these."""

INDEXED = {"index_select": 2, "gather": 2, "index": 1, "take_along_dim": 1, "embedding": 1}
"""Reads by index -> the place of the index; the source comes first."""

CREATES = {
    "arange", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "new_empty",
    "new_empty_strided", "new_full", "new_ones", "new_zeros", "ones", "ones_like", "scalar_tensor", "zeros",
    "zeros_like",
}  # fmt: skip
"""Depends on shapes alone."""

AXES = {
    "_log_softmax": 1, "_safe_softmax": 1, "_softmax": 1, "all": 1, "amax": 1, "amin": 1, "aminmax": 1,
    "any": 1, "argmax": 1, "argmin": 1, "argsort": 1, "count_nonzero": 1, "cummax": 1, "cummin": 1,
    "cumprod": 1,
    "cumsum": 1, "kthvalue": 2, "linalg_vector_norm": 2, "logcumsumexp": 1, "logsumexp": 1, "max": 1,
    "mean": 1, "median": 1, "min": 1, "mode": 1, "nansum": 1, "norm": 2, "prod": 1, "sort": 1,
    "std": 1, "std_mean": 1, "sum": 1, "topk": 2, "var": 1, "var_mean": 1,
}  # fmt: skip
"""Takes all along axes together -> the place of the axes among the arguments; without axes, everything."""

LAST = {"argsort", "median", "mode", "sort", "topk", "kthvalue"}
"""Of these the last axis is meant where none is written."""

SAMPLES = {
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention", "adaptive_max_pool2d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "col2im", "im2col", "reflection_pad1d", "reflection_pad2d",
    "replication_pad1d", "replication_pad2d", "upsample_nearest2d", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "upsample_bicubic2d", "upsample_bilinear2d", "upsample_linear1d",
}  # fmt: skip
"""Each sample (the first axis) by itself; an argument of one sample serves all."""

DECIDES = {"_local_scalar_dense", "is_nonzero", "equal", "bincount", "histc", "masked_select", "nonzero",
           "repeat_interleave", "unique_consecutive", "_unique2", "unique_dim"}  # fmt: skip
"""Numbers become shapes or decisions of the program, of which everything that follows may depend."""

NOTHING = {
    "_assert_async",
    "_assert_scalar",
    "sym_size",
    "sym_numel",
    "_assert_tensor_metadata",
    "device",
    "size",
}
"""Gives no number that depends on any."""

RANDOMS = {"bernoulli", "dropout", "multinomial", "native_dropout", "normal", "rand", "rand_like", "randint",
           "randint_like", "randn", "randn_like", "randperm", "uniform", "exponential"}  # fmt: skip

WHY = {
    "reduce": "takes numbers of several rows together",
    "move": "puts numbers of one row into another",
    "product": "multiplies numbers of several rows",
    "index": "reads at places that another row decides",
    "decide": "lets numbers of the batch decide shapes or what runs",
    "norm": "uses the statistics of the batch",
    "unknown": "is an operation without a rule",
    "point": "combines numbers of several rows",
}

PRODUCTS = {
    "mm",
    "bmm",
    "addmm",
    "baddbmm",
    "mv",
    "addmv",
    "dot",
    "vdot",
    "linear",
    "matmul",
    "_int_mm",
    "addbmm",
}
CONVOLUTIONS = {"convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "conv_tbc"}
LAYER_NORMS = {"native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm"}
BATCH_NORMS = {
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm",
    "cudnn_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update", "_batch_norm_impl_index",
}  # fmt: skip
WRITES = {"index_put", "_unsafe_index_put", "scatter", "scatter_add", "scatter_reduce", "index_add",
          "index_copy", "index_fill", "slice_scatter", "select_scatter", "masked_scatter", "put"}  # fmt: skip
POINTWISE = {"_to_copy", "bitwise_and", "bitwise_or", "bitwise_not", "bitwise_xor", "masked_fill", "where",
             "gelu", "silu", "_conj", "fake_quantize_per_channel_affine",
             "fake_quantize_per_tensor_affine_cachemask",
             "fake_quantize_per_tensor_affine", "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
             "floor_divide", "lerp", "log_sigmoid_forward", "real", "imag", "view_as_real",
             "__lshift", "__rshift", "__xor", "to", "type_as"}  # fmt: skip
"""Elementwise, where torch does not say so itself."""
