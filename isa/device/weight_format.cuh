// Weight formats as a task's flags have them (isa.weight_format), and the piece of a tile that one warp takes whole (isa.machine.Piece).
#pragma once
#include "isa/device/block.cuh"

// Codes with the bits of both W_INT8 and W_INT4 are floating-point numbers of 8 bits: matvec_fp8.cuh.
constexpr int W_INT8 = 4, W_INT4 = 8, W_ASYMMETRIC = 16, W_FP16_SCALE = 32, W_GROUP_SHIFT = 6;

template <int FLAGS>
struct Weights {
  static constexpr int BITS = FLAGS & W_INT8 ? 8 : FLAGS & W_INT4 ? 4 : 0;  // of a code; 0: elements of the machine's type
  static constexpr bool QUANTISED = BITS != 0, ASYMMETRIC = FLAGS & W_ASYMMETRIC, FP16_SCALE = FLAGS & W_FP16_SCALE;
  static constexpr int GROUP = FLAGS >> W_GROUP_SHIFT & 3 ? 16 << (FLAGS >> W_GROUP_SHIFT & 3) : 0;  // columns of a scale; 0: the row
  static constexpr int FRAGMENT = QUANTISED ? 8 * FRAGMENT_BYTES / TILE_ROWS / max_of(BITS, 1) : FRAGMENT_COLUMNS;  // its columns
  static constexpr int COLUMNS = max_of(GROUP, FRAGMENT);
  static constexpr int FRAGMENTS = COLUMNS / FRAGMENT;
  static constexpr int GROUPS = GROUP ? COLUMNS / max_of(GROUP, 1) : 0;  // whose scales lie in a piece
  static constexpr int SCALES_BYTES = TILE_ROWS * 2, ZEROS_BYTES = ASYMMETRIC ? TILE_ROWS : 0;  // of one group
  static constexpr int PIECE_BYTES = FRAGMENTS * FRAGMENT_BYTES + GROUPS * (SCALES_BYTES + ZEROS_BYTES);
  static constexpr int TAIL_BYTES = QUANTISED && !GROUP ? SCALES_BYTES + ZEROS_BYTES : 0;  // scales at the end of every chunk
  static_assert(!QUANTISED || !WIDE, "quantised weights need 16-bit activations");
};
