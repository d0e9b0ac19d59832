// Chooses how the work inside a head is done, by dtype and instruction set.
#pragma once

#include "attention/float_engine.h"

namespace dvla_fast::attention {

template <class scalar_t>
using Engine = FloatEngine<scalar_t>;

}  // namespace dvla_fast::attention
