// Chooses how the work inside a head is done, by dtype and instruction set.
#pragma once

#include "attention/bf16_engine.h"
#include "attention/float_engine.h"

namespace dvla_fast::attention {

#if defined(__AVX512BF16__)
template <class scalar_t>
using Engine =
    std::conditional_t<std::is_same_v<scalar_t, bf16>, Bf16Engine, FloatEngine<scalar_t>>;
#else
template <class scalar_t>
using Engine = FloatEngine<scalar_t>;
#endif

}  // namespace dvla_fast::attention
