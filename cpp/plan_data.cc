#include "plan_data.h"

#include <algorithm>

namespace sparsetrain {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t floor_mod(int64_t a, int64_t b) { return (a % b + b) % b; }
int64_t floor_div(int64_t a, int64_t b) { return (a - floor_mod(a, b)) / b; }

// Taps tap[0..n) of a strand in which pixel i and tap j meet column base + i - j, cut to what a sweep offers.
void cut_strand(int phase, int64_t base, const std::vector<int64_t>& tap, std::vector<Strand>* strands) {
  const int64_t n = static_cast<int64_t>(tap.size());
  const int64_t pieces = ceil_div(n, kMaxTaps);
  for (int64_t i = 0, begin = 0; i < pieces; ++i) {
    const int64_t taps = (n - begin) / (pieces - i);
    Strand strand{};
    strand.phase = phase;
    strand.taps = static_cast<int>(taps);
    strand.first = base - begin - (taps - 1);
    for (int64_t t = 0; t < taps; ++t) strand.tap[t] = tap[begin + t];
    strands->push_back(strand);
    begin += taps;
  }
}

void split_fwd(const ConvShape& shape, DataPlan* plan) {
  ColumnClass all{0, 1, plan->out_columns, {}};
  for (int64_t residue = 0; residue < std::min(shape.stride_w, shape.s); ++residue) {
    const int64_t start = floor_mod(residue - shape.pad_left, shape.stride_w);
    const int64_t pixels = start < plan->in_columns ? ceil_div(plan->in_columns - start, shape.stride_w) : 0;
    std::vector<int64_t> tap;
    for (int64_t s = residue; s < shape.s; s += shape.stride_w) tap.push_back(s);
    const int64_t base = (start + shape.pad_left - residue) / shape.stride_w;
    cut_strand(static_cast<int>(plan->phases.size()), base, tap, &all.strands);
    plan->phases.push_back({start, shape.stride_w, pixels});
  }
  plan->classes.push_back(std::move(all));
}

void split_bwd_input(const ConvShape& shape, DataPlan* plan) {
  plan->phases.push_back({0, 1, plan->in_columns});
  for (int64_t start = 0; start < std::min(shape.stride_w, plan->out_columns); ++start) {
    ColumnClass one{start, shape.stride_w, ceil_div(plan->out_columns - start, shape.stride_w), {}};
    // Tap s0 + st*j reaches column u = o + j - b; descending taps make that the form of a sweep.
    const int64_t s0 = floor_mod(start + shape.pad_left, shape.stride_w);
    std::vector<int64_t> tap;
    for (int64_t s = s0; s < shape.s; s += shape.stride_w) tap.insert(tap.begin(), s);
    const int64_t b = floor_div(start + shape.pad_left - s0, shape.stride_w);
    if (!tap.empty()) cut_strand(0, static_cast<int64_t>(tap.size()) - 1 - b, tap, &one.strands);
    plan->classes.push_back(std::move(one));
  }
}

int widest_strand(const DataPlan& plan) {
  int taps = 1;
  for (const ColumnClass& c : plan.classes) {
    for (const Strand& s : c.strands) taps = std::max(taps, s.taps);
  }
  return taps;
}

bool offered(const Kernels& kernels, int taps, int vectors) {
  for (int t = 1; t <= taps; ++t) {
    if (kernels.data.sweep[t][vectors] == nullptr) return false;
  }
  return true;
}

// The widest feature block that registers allow, unless a narrower one leaves fewer lanes unused in the last block.
void choose_vectors(const Kernels& kernels, int taps, DataPlan* plan) {
  const int64_t needed = ceil_div(plan->features, kernels.lanes);
  int64_t best_cost = 0;
  for (int v = kMaxVectors; v >= 1; --v) {
    if (!offered(kernels, taps, v)) continue;
    const int64_t blocks = ceil_div(needed, v);
    int last = static_cast<int>(needed - (blocks - 1) * v);
    while (!offered(kernels, taps, last)) ++last;
    // In vector FMAs per non-zero and tap, plus the loop around them that every block pays again.
    const int64_t cost = taps * ((blocks - 1) * v + last) + 2 * blocks;
    if (plan->vectors == 0 || cost < best_cost) {
      best_cost = cost;
      plan->vectors = v;
      plan->last_vectors = last;
      plan->blocks = blocks;
    }
  }
}

void choose_blocks(const Machine& machine, const Kernels& kernels, int taps, DataPlan* plan) {
  const int lanes = kernels.lanes;
  const int64_t features = static_cast<int64_t>(plan->vectors) * lanes;
  // A filter block leaves a quarter of L1 to the sums and the pixels that pass by.
  const int64_t fits = machine.l1_bytes * 3 / 4 / (4 * taps * features);
  const int64_t most = std::min<int64_t>(kMaxBlock, ceil_div(plan->channels, lanes) * lanes);
  int64_t block = std::clamp<int64_t>(fits / lanes * lanes, lanes, most);
  block = ceil_div(ceil_div(plan->channels, ceil_div(plan->channels, block)), lanes) * lanes;  // even blocks
  plan->channel_block = static_cast<int>(block);

  // Partial sums of a tile: a fifth of L2. Its input: at most L2, read block by block.
  const int64_t step = plan->classes.front().step;
  const int64_t sum_bytes = machine.l2_bytes / 5;
  const int64_t column_bytes = 4 * features;
  int64_t columns = ceil_div(std::min(plan->out_columns, std::max<int64_t>(16, sum_bytes / column_bytes)), step) * step;
  columns = ceil_div(ceil_div(plan->out_columns, ceil_div(plan->out_columns, columns)), step) * step;
  plan->tile_columns = columns;
  const int64_t all_rows = plan->images * plan->out_rows;
  int64_t rows = std::max<int64_t>(1, sum_bytes / (columns * column_bytes));
  // Enough tiles for the threads of any machine, as long as a tile is worth its filter traffic.
  const int64_t worth = std::max<int64_t>(1, sum_bytes / 4 / (columns * column_bytes));
  const int64_t wanted = ceil_div(all_rows * plan->column_tiles(), 16);
  rows = std::clamp<int64_t>(wanted, std::min(worth, rows), rows);
  rows = ceil_div(all_rows, ceil_div(all_rows, rows));
  plan->tile_rows = rows;
}

}  // namespace

int64_t DataPlan::input_row(int64_t y, int64_t r) const {
  if (op == DataOp::kFwd) {
    const int64_t row = y * row_stride - row_pad + r;
    return row >= 0 && row < in_rows ? row : -1;
  }
  const int64_t scaled = y + row_pad - r;
  if (scaled < 0 || scaled % row_stride != 0) return -1;
  const int64_t row = scaled / row_stride;
  return row < in_rows ? row : -1;
}

std::pair<int64_t, int64_t> DataPlan::input_rows(int64_t y0, int64_t y1) const {
  int64_t begin, end;
  if (op == DataOp::kFwd) {
    begin = y0 * row_stride - row_pad;
    end = (y1 - 1) * row_stride - row_pad + kernel_rows;
  } else {
    begin = floor_div(y0 + row_pad - (kernel_rows - 1) + row_stride - 1, row_stride);
    end = floor_div(y1 - 1 + row_pad, row_stride) + 1;
  }
  begin = std::clamp<int64_t>(begin, 0, in_rows);
  return {begin, std::clamp<int64_t>(end, begin, in_rows)};
}

DataPlan plan_data(DataOp op, const ConvShape& shape, const Machine& machine, const Kernels& kernels) {
  DataPlan plan{};
  plan.op = op;
  const bool fwd = op == DataOp::kFwd;
  const bool flat = shape.r == 1 && shape.s == 1 && shape.stride_h == 1 && shape.stride_w == 1 && shape.pad_top == 0 &&
                    shape.pad_left == 0 && shape.oh == shape.h && shape.ow == shape.w;
  plan.images = flat ? 1 : shape.n;
  plan.in_rows = flat ? 1 : fwd ? shape.h : shape.oh;
  plan.in_columns = flat ? shape.n * shape.h * shape.w : fwd ? shape.w : shape.ow;
  plan.channels = fwd ? shape.c : shape.k;
  plan.out_rows = flat ? 1 : fwd ? shape.oh : shape.h;
  plan.out_columns = flat ? plan.in_columns : fwd ? shape.ow : shape.w;
  plan.features = fwd ? shape.k : shape.c;
  plan.kernel_rows = shape.r;
  plan.kernel_columns = shape.s;
  plan.row_stride = shape.stride_h;
  plan.row_pad = shape.pad_top;
  fwd ? split_fwd(shape, &plan) : split_bwd_input(shape, &plan);
  const int taps = widest_strand(plan);
  choose_vectors(kernels, taps, &plan);
  choose_blocks(machine, kernels, taps, &plan);
  plan.copy = shape.r * shape.s > 1;
  const int64_t result_bytes = 4 * plan.images * plan.out_rows * plan.out_columns * plan.features;
  plan.stream = plan.features % kernels.lanes == 0 && result_bytes > machine.l3_bytes / 4;
  plan.dense_density = 0.97f;
  plan.pair_density = 0.25f;
  return plan;
}

std::vector<std::pair<std::string, std::string>> describe(const DataPlan& plan) {
  std::vector<std::pair<std::string, std::string>> out;
  const auto add = [&out](const char* key, auto value) { out.emplace_back(key, std::to_string(value)); };
  size_t strands = 0;
  for (const ColumnClass& c : plan.classes) strands += c.strands.size();
  add("column_classes", plan.classes.size());
  add("strands", strands);
  add("taps", widest_strand(plan));
  add("feature_vectors", plan.vectors);
  add("last_feature_vectors", plan.last_vectors);
  add("feature_blocks", plan.blocks);
  add("channel_block", plan.channel_block);
  add("tile_rows", plan.tile_rows);
  add("tile_columns", plan.tile_columns);
  add("tiles", plan.row_tiles() * plan.column_tiles());
  add("copy", plan.copy);
  add("stream", plan.stream);
  add("dense_density", plan.dense_density);
  add("pair_density", plan.pair_density);
  return out;
}

}  // namespace sparsetrain
