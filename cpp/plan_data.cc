#include "plan_data.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"
#include "pixels.h"

namespace sparsetrain {
namespace {

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

// Few channels would leave most of a 64-bit mask unused, and every tap would walk it again.
bool folds(const ConvShape& shape) { return shape.s > 1 && shape.c < 8 && shape.s * shape.c <= kMaxBlock; }

void fold_fwd(const ConvShape& shape, DataPlan* plan) {
  plan->fold = shape.stride_w * shape.c;
  plan->fold_pad = shape.pad_left * shape.c;
  plan->channels = shape.s * shape.c;
  plan->kernel_columns = 1;
  plan->phases.push_back({0, 1, plan->out_columns});
  plan->classes.push_back({0, 1, plan->out_columns, {Strand{0, 0, 1, {0}}}});
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

// What a sweep spends its time on, in the time of a multiply-add of a vector between registers.
struct Costs {
  double load;          // a multiply-add that loads its filter vector
  double pair;          // one of two that share the load
  double dense;         // one of several
  double ends_of_rows;  // more for one of a dense sweep of a few taps, which does not leave out what is beyond a row
  double visit;         // finding a channel, its broadcast
  double ends;          // of a pair of pixels: its three lists
  double step;          // more for a pair of pixels in place, whatever it has
  double exposed;       // more for these where a visit is one multiply-add, and nothing hides them;
  double hidden;        // in proportion up to visits of so many
  double sums;          // moving a vector of sums of a pixel in and out
  double misses;        // as a share of load: more for a multiply-add whose filter block fills L1,
  double dense_misses;  // and yet more, times the density
  double scan;          // finding the zeros of 16 channels of a pixel, where values stay in place
  double wait;          // a visit, at least, if the one before added to the same sums
  double pack;          // packing the non-zeros of a vector of the input, beyond copying it
};

// Where there is one of these a cycle (fitted to measurements and an emulation, bench/NOTES.md), loads, sums and
// mispredicted ends of lists partly hide behind it. Two vectors of eight lanes a cycle have their two loads.
Costs costs_of(const Machine& machine, const Kernels& kernels) {
  if (machine.single_fma(kernels.lanes))
    return {
        .load = 1,
        .pair = 1,
        .dense = 1,
        .ends_of_rows = 0.04,
        .visit = 0.5,
        .ends = 15,
        .step = 15,
        .exposed = 30,
        .hidden = 3,
        .sums = 3,
        .misses = 0.02,
        .dense_misses = 0.05,
        .scan = 3,
        .wait = 2.8,
        .pack = 4,
    };
  if (kernels.lanes == 8)
    return {
        .load = 1.05,
        .pair = 1,
        .dense = 1,
        .ends_of_rows = 0.04,
        .visit = 1,
        .ends = 20,
        .step = 15,
        .exposed = 140,
        .hidden = 25,
        .sums = 3,
        .misses = 0.07,
        .dense_misses = 0,
        .scan = 3,
        .wait = 7.5,
        .pack = 4,
    };
  return {
      .load = 1.27,
      .pair = 1.18,
      .dense = 1.09,
      .ends_of_rows = 0,
      .visit = 2,
      .ends = 70,
      .step = 20,
      .exposed = 60,
      .hidden = 6,
      .sums = 7.7,
      .misses = 0.07,
      .dense_misses = 0,
      .scan = 6,
      .wait = 7,
      .pack = 8,
  };
}

// Channels of a filter block of at most this many bytes.
int channels_in_block(int64_t bytes, int lanes, int taps, int vectors, int64_t channels) {
  const int64_t fits = bytes / (4 * taps * vectors * lanes);
  const int64_t most = std::min<int64_t>(kMaxBlock, ceil_div(channels, lanes) * lanes);
  const int64_t block = std::clamp<int64_t>(fits / lanes * lanes, lanes, most);
  return static_cast<int>(ceil_div(ceil_div(channels, ceil_div(channels, block)), lanes) * lanes);  // even blocks
}

// Rows of the kernel that a sparse sweep takes.
int rows_of_sweeps(const DataPlan& plan) { return plan.tall ? static_cast<int>(plan.kernel_rows) : 1; }

// A way to cut features and channels into filter blocks, and what a pixel and channel cost with it: in walks of all
// strands, in dense sweeps of the widest.
struct Blocking {
  int vectors, last_vectors;
  int64_t blocks;
  int channel_block;
  double cost;
};

// Of the sweeps of a strand that visit a share `density` of the channels, one by one. `fills`: its filter block takes
// all of L1.
double walk_cost(const Costs& costs, double density, bool fills, bool in_place, int taps, int vectors,
                 int channel_block) {
  const double load = costs.load * (fills ? 1 + costs.misses + costs.dense_misses * density : 1);
  const double wait = in_place ? costs.wait : costs.wait / sets_of_sums(taps, vectors);
  return density * std::max(taps * vectors * load + costs.visit, wait) +
         (costs.sums * vectors + costs.ends / 2) / channel_block;
}

// A multiply-add of a dense sweep, where it waits for those before it: a column takes a tap of each pixel of a step in
// turn, and eight are on their way at a time.
double waiting(const Kernels& kernels, int taps, int vectors) {
  return 8.0 / (std::max(taps, kernels.data.dense_pixels[taps][vectors]) * vectors);
}

// Of dense sweeps: more than a load for three multiply-adds is felt, and so are the sums and the pass over the input.
double dense_cost(const Costs& costs, const Kernels& kernels, int taps, int vectors, int channel_block) {
  const int work = taps * vectors;
  const int pixels = kernels.data.dense_pixels[taps][vectors];
  const double loads = 1.0 / pixels + 1.0 / work;
  return work * std::max(1 + 0.58 * std::max(0.0, loads - 0.35), waiting(kernels, taps, vectors)) +
         costs.sums * vectors / channel_block + 0.3;
}

// The cheapest blocking of features and channels. A filter block takes three quarters of L1, which it shares with the
// sums and pixels that pass by; or all of it, which costs less the fewer of its lines non-zeros ask for in turn:
// larger blocks move sums and end lists less often.
Blocking choose_blocking(const Machine& machine, const Kernels& kernels, int taps, bool dense, double density,
                         const DataPlan& plan) {
  const Costs costs = costs_of(machine, kernels);
  const int64_t needed = ceil_div(plan.features, kernels.lanes);
  const bool in_place = plan.pointwise || plan.fold > 0;
  Blocking best{};
  // Unused lanes of the last block count like any others.
  for (int v = kMaxVectors; v >= 1; --v) {
    if (!offered(kernels, taps, v)) continue;
    const int64_t blocks = ceil_div(needed, v);
    int last = static_cast<int>(needed - (blocks - 1) * v);
    while (!offered(kernels, taps, last)) ++last;
    if (blocks == 1 && last != v) continue;
    for (const bool whole_l1 : {false, true}) {
      if (whole_l1 && dense) continue;
      const int64_t bytes = whole_l1 ? machine.l1_bytes : machine.l1_bytes * 3 / 4;
      const int channel_block = channels_in_block(bytes, kernels.lanes, taps * rows_of_sweeps(plan), v, plan.channels);
      const auto cost_of = [&](int vectors) {
        if (dense) return dense_cost(costs, kernels, taps, vectors, channel_block);
        double cost = 0;
        for (const ColumnClass& c : plan.classes) {
          for (const Strand& s : c.strands) {
            cost += walk_cost(costs, density, whole_l1 && s.taps == taps, in_place, s.taps, vectors, channel_block);
          }
        }
        return cost;
      };
      const double cost = static_cast<double>(blocks - 1) * cost_of(v) + cost_of(last);
      if (best.vectors == 0 || cost < best.cost) best = {v, last, blocks, channel_block, cost};
    }
  }
  return best;
}

// So many tiles or a few more, a number that 2, 4, 8 threads share evenly. (Fewer than six are left to
// threads that help each other, DataPlan::share.)
int64_t shareable(int64_t tiles) {
  if (tiles < 6) return tiles;
  int64_t step = 2;
  while (8 * step <= tiles) step *= 2;
  return ceil_div(tiles, step) * step;
}

void choose_blocks(const Machine& machine, const Kernels& kernels, const Blocking& blocking, double density,
                   DataPlan* plan) {
  plan->vectors = blocking.vectors;
  plan->last_vectors = blocking.last_vectors;
  plan->blocks = blocking.blocks;
  plan->channel_block = blocking.channel_block;
  const int64_t features = static_cast<int64_t>(plan->vectors) * kernels.lanes;

  // Partial sums of a tile and one feature block: a fifth of L2. There should be enough tiles for the threads of any
  // machine, but a small tile is not worth its filter traffic: from a quarter of that, or more where a filter block has
  // one tap and does little with each of its lines.
  constexpr int64_t kTiles = 16;
  const int64_t all_rows = plan->images * plan->out_rows, pixels = all_rows * plan->out_columns;
  // One tap: every feature block reads all of the tile's input again. It should stay in L2, a quarter of it beside the
  // next tile's that is fetched meanwhile; but a tile of few pixels is not worth its filter traffic, if there are
  // enough of larger ones. Others read a copy, which is bounded.
  const int64_t fits = machine.l2_bytes / (4 * plan->channels);  // pixels
  const int64_t worthwhile = ceil_div(pixels, 256) * blocking.blocks >= kTiles ? 256 : 128;
  const int64_t input_limit = !plan->pointwise ? 2 * fits : std::max(fits / 4, std::min(fits * 4 / 5, worthwhile));
  const int64_t most = std::max<int64_t>(16, std::min(machine.l2_bytes / 5 / (4 * features), input_limit));
  // A tile reads all of the kernel. Where that comes from beyond L2, a vector of it takes as long as some 13
  // multiply-adds, and there should be many more.
  const int64_t kernel_bytes = 4 * plan->kernel_rows * plan->kernel_columns * plan->channels * plan->features;
  const double far = kernel_bytes > machine.l2_bytes / 2 ? 256 / std::max(density, 0.01) : 0;
  const int64_t worth =
      std::max<int64_t>(16, plan->pointwise ? most * 3 / 4 : std::clamp(static_cast<int64_t>(far), most / 4, most));
  const int64_t step = plan->classes.front().step;
  const int64_t wanted = std::clamp(ceil_div(pixels, kTiles), worth, most);
  const int64_t column_tiles = shareable(ceil_div(plan->out_columns, all_rows == 1 ? wanted : most));
  plan->tile_columns = ceil_div(ceil_div(plan->out_columns, column_tiles), step) * step;
  const int64_t row_tiles = ceil_div(all_rows, std::max<int64_t>(1, wanted / plan->tile_columns));
  plan->tile_rows = ceil_div(all_rows, shareable(row_tiles));
}

// Whether packing the non-zeros of a 1x1 kernel's input pays, which takes about as long as finding them: it does if
// many features, in many blocks, read them. Fitted where a multiply-add has one load, and not known elsewhere.
bool point_packs(const Machine& machine, const Kernels& kernels, double density, const DataPlan& plan) {
  const bool fitted = machine.single_fma(kernels.lanes) || kernels.lanes == 8;
  if (!fitted || density > 0.6) return false;
  if (density >= plan.pair_density) return plan.blocks >= (density < 0.4 ? 4 : 8);
  return plan.features >= 256 && plan.blocks * plan.channel_blocks() >= 4;
}

// Roughly: what the zeros leave to do, and what is done whatever they are.
bool serial(const Machine& machine, const Kernels& kernels, const DataPlan& plan) {
  constexpr double kScan = 2;         // finding the zeros of a vector of the input
  constexpr double kFar = 18;         // more for a vector of a kernel that does not stay in L2
  int64_t taps = 0, column_taps = 0;  // of the kernel's rows; of all columns of a row of the result
  for (const ColumnClass& c : plan.classes) {
    for (const Strand& s : c.strands) {
      taps += s.taps;
      column_taps += s.taps * c.columns;
    }
  }
  // BWI: a row of the result meets every row_stride-th row of the kernel.
  const int64_t rows = plan.images * plan.out_rows * plan.kernel_rows / (plan.op == DataOp::kFwd ? 1 : plan.row_stride);
  const int64_t features = ceil_div(plan.features, kernels.lanes), channels = ceil_div(plan.channels, kernels.lanes);
  const int64_t kernel = taps * plan.kernel_rows * plan.channels * features;
  const int64_t result = plan.images * plan.out_rows * plan.out_columns * features;
  double work = plan.visited * static_cast<double>(rows * column_taps * plan.channels * features) +
                kScan * static_cast<double>(plan.images * plan.in_rows * plan.in_columns * channels);
  if (4 * kernel * kernels.lanes > machine.l2_bytes / 2) work += kFar * static_cast<double>(kernel);
  return too_small_for_threads(work, kernel + result);
}

// Pairs share loads, but end three lists where two single pixels end two. Two vectors of eight lanes a cycle have their
// two loads, and few multiply-adds hide no ends.
constexpr float kPairs = 0.25f, kTallPairs = 0.35f, kManyPairs = 0.5f;
float pair_density(const Kernels& kernels, int taps, const DataPlan& plan) {
  const bool few = plan.tall || taps * plan.vectors <= (taps > 1 ? 6 : 3);
  if (kernels.lanes == 8 && few) return kManyPairs;
  return plan.tall ? kTallPairs : kPairs;
}

// How much more tall sweeps multiply than the result needs: of an input row that is swept for fewer rows than the
// kernel has. 1 for other sweeps.
double idle_rows(const DataPlan& plan) {
  if (!plan.tall) return 1;
  if (plan.tile_rows < plan.out_rows) {
    return static_cast<double>(plan.tile_rows + plan.kernel_rows - 1) / static_cast<double>(plan.tile_rows);
  }
  int64_t met = 0;
  for (int64_t y = 0; y < plan.out_rows; ++y) {
    for (int64_t r = 0; r < plan.kernel_rows; ++r) met += plan.input_row(y, r) >= 0 ? 1 : 0;
  }
  const auto [begin, end] = plan.input_rows(0, plan.out_rows);
  return static_cast<double>((end - begin) * plan.kernel_rows) / static_cast<double>(std::max<int64_t>(met, 1));
}

// The density at which walking pixel pairs costs what dense sweeps cost, for a pair of pixels, a channel block and all
// feature blocks; or single pixels, where those are walked. kNever: walking all channels costs less.
float dense_density(const Machine& machine, const Kernels& kernels, int taps, const DataPlan& plan) {
  constexpr float kNever = 2;
  constexpr double kLong = 48;  // channels: shorter lists of packed values end more often where expected
  const Costs costs = costs_of(machine, kernels);
  const double n = static_cast<double>(plan.channels) / static_cast<double>(plan.channel_blocks());
  // Dense sweeps of one or two taps also have few sums to add to in turn.
  const int ends_of_rows = !plan.packs || taps > 3 ? 0 : taps == 3 ? 1 : 2;
  // n (d^2 both + 2 d (1 - d) single) + ends + scan = dense
  double both = 0, single = 0, ends = 0, dense = 0, all_work = 0;
  const auto add = [&](int vectors, int64_t count) {
    const int dense_vectors = vectors;
    vectors *= rows_of_sweeps(plan);
    const double blocks = static_cast<double>(count), work = taps * vectors;
    // Point sweeps keep the sums of two pixels apart; others add up to two products of a pair to a sum.
    const double wait = plan.packs ? costs.wait / sets_of_sums(taps, vectors) : costs.wait;
    const double exposed = std::max(0.0, costs.hidden - work) / (costs.hidden - 1) * costs.exposed;
    both += blocks * std::max(2 * work * costs.pair + costs.visit / 2, wait * (plan.packs ? std::min(2, taps) : 1));
    single += blocks * std::max(work * costs.load + costs.visit, wait);
    const double step = costs.step * std::min(1.0, work - 1);  // of one multiply-add it is in `exposed`
    ends += blocks * (costs.ends + (plan.packs ? exposed * std::min(1.0, n / kLong) : exposed + step));
    dense += blocks * 2 * work * n *
             std::max(costs.dense + ends_of_rows * costs.ends_of_rows, waiting(kernels, taps, dense_vectors));
    all_work += blocks * work;
  };
  add(plan.vectors, plan.blocks - 1);
  add(plan.last_vectors, 1);
  const double idle = idle_rows(plan);
  both *= idle;
  single *= idle;
  ends *= idle;
  // Scanning or packing two pixels, shared by all sweeps that read them.
  const double apart = plan.pointwise && plan.phases.front().step > 1 ? 2 : 1;  // lines that are not read anyway
  const double scan = plan.packs && !plan.pointwise
                          ? costs.pack * (2 * n / kernels.lanes) * all_work / plan.value_work
                          : apart * costs.scan * (n / 8 + 4) / static_cast<double>(plan.kernel_rows);
  const double target = dense - ends - scan;
  // Two single pixels: 2 n d single + ends / 2 + scan = dense
  const double alone = std::max(0.0, (dense - ends / 2 - scan) / (2 * n * single));
  const bool singles = plan.pair_density > kPairs;  // instead of what pairs cost up to there
  if (singles && alone < plan.pair_density) return static_cast<float>(alone);
  const float least = singles ? plan.pair_density : 0;
  if (target <= 0) return least;
  // The smaller root of (2 single - both) d^2 - 2 single d + target / n, written so that both signs of the first
  // coefficient are safe.
  const double square = 2 * single - both, root = single * single - square * target / n;
  if (root < 0 || n * both <= target) return kNever;
  return std::max(least, static_cast<float>(target / n / (single + std::sqrt(root))));
}

// Whether all rows of the kernel may go in one sweep: where visits of a row would be short.
bool offers_tall(const Kernels& kernels, const DataPlan& plan) {
  return kernels.data.tall_sweep != nullptr && plan.features <= kernels.lanes && plan.fold == 0 &&
         plan.kernel_rows == kTallRows && widest_strand(plan) == kTallTaps && plan.row_stride == 1 &&
         plan.classes.size() == 1 && plan.classes.front().strands.size() == 1;
}

// How sparse sweeps go, and up to which density.
void choose_walks(const Machine& machine, const Kernels& kernels, DType dtype, double density, int taps,
                  DataPlan* plan) {
  choose_blocks(machine, kernels, choose_blocking(machine, kernels, taps, false, density, *plan), density, plan);
  plan->pair_density = pair_density(kernels, taps, *plan);
  plan->packs =
      plan->pointwise ? dtype == DType::kF32 && point_packs(machine, kernels, density, *plan) : plan->fold == 0;
  plan->copy = !plan->pointwise || plan->packs || dtype != DType::kF32;
  plan->dense_density = dense_density(machine, kernels, taps, *plan);
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

DataPlan plan_data(DataOp op, const ConvShape& given, Mode mode, DType dtype, double density, const Machine& machine,
                   const Kernels& kernels) {
  DataPlan plan{};
  plan.op = op;
  const bool fwd = op == DataOp::kFwd;
  const ConvShape shape = given.flattened();
  plan.images = shape.n;
  plan.in_rows = fwd ? shape.h : shape.oh;
  plan.in_columns = fwd ? shape.w : shape.ow;
  plan.channels = fwd ? shape.c : shape.k;
  plan.in_channels = plan.channels;
  plan.out_rows = fwd ? shape.oh : shape.h;
  plan.out_columns = fwd ? shape.ow : shape.w;
  plan.features = fwd ? shape.k : shape.c;
  plan.kernel_rows = shape.r;
  plan.kernel_columns = shape.s;
  plan.row_stride = shape.stride_h;
  plan.row_pad = shape.pad_top;
  if (!fwd) {
    split_bwd_input(shape, &plan);
  } else if (folds(shape)) {
    fold_fwd(shape, &plan);
  } else {
    split_fwd(shape, &plan);
  }
  const int taps = widest_strand(plan);
  plan.pointwise = shape.r * shape.s == 1;
  plan.value_work = static_cast<double>(shape.r * shape.s * ceil_div(plan.features, kernels.lanes)) /
                    static_cast<double>(fwd ? shape.stride_h * shape.stride_w : 1);
  plan.tall = mode != Mode::kDense && offers_tall(kernels, plan);
  choose_walks(machine, kernels, dtype, density, taps, &plan);
  // What is dense for tall sweeps may be sparse for others.
  constexpr double kMostIdle = 1.4;
  if (plan.tall && (idle_rows(plan) > kMostIdle || (mode == Mode::kAuto && density >= plan.dense_density))) {
    plan.tall = false;
    choose_walks(machine, kernels, dtype, density, taps, &plan);
  }
  const bool dense = mode == Mode::kDense || (mode == Mode::kAuto && density >= plan.dense_density);
  if (dense) {
    choose_blocks(machine, kernels, choose_blocking(machine, kernels, taps, true, density, plan), 1, &plan);
  }
  const int64_t result_bytes = 4 * plan.images * plan.out_rows * plan.out_columns * plan.features;
  // Where taps are many, writing is a small share of the work: by-passing the caches gained up to 8 % of it where there
  // is one multiply-add a cycle, and lost up to 7 % elsewhere.
  const bool single_fma = machine.single_fma(kernels.lanes);
  // A small result of much input, walked in pairs, comes in bursts, and sweeps wait for writes past the caches: 12 to
  // 15 % lost.
  const bool bursts = single_fma && !dense && density >= plan.pair_density && 4 * plan.features <= plan.channels;
  const bool streams = plan.pointwise ? !bursts : plan.packs && single_fma;
  plan.stream = streams && plan.features % kernels.lanes == 0 && result_bytes > machine.l3_bytes / 4;
  // A single visit has a load for each multiply-add, and its value is one more.
  plan.take = single_fma;
  plan.visited = dense ? 1 : density;
  plan.serial = serial(machine, kernels, plan);
  return plan;
}

int lanes_for(int64_t features, const Machine& machine, int lanes) {
  const int64_t halves = ceil_div(features, lanes / 2);
  return machine.single_fma(lanes) && halves % 2 == 1 && halves <= 3 ? lanes / 2 : lanes;
}

const Kernels& kernels_for(int64_t features, const Machine& machine, const Kernels& kernels) {
  return lanes_for(features, machine, kernels.lanes) == kernels.lanes ? kernels : *kernels.narrow;
}

Description describe_data(DataOp op, const ConvShape& shape, double density, const Machine& machine,
                          const Kernels& isa) {
  const Kernels& kernels = kernels_for(op == DataOp::kFwd ? shape.k : shape.c, machine, isa);
  const auto plan_of = [&](double d) { return plan_data(op, shape, Mode::kAuto, DType::kF32, d, machine, kernels); };
  const DataPlan plan = plan_of(density);
  Description out;
  if (op == DataOp::kBwdInput && 2 * plan.features < kernels.lanes && plan.kernel_rows * plan.kernel_columns > 1) {
    out.add("lax", "few input features leave most lanes of a vector idle");
  }
  size_t strands = 0;
  for (const ColumnClass& c : plan.classes) strands += c.strands.size();
  out.add("path", density < plan.dense_density ? "sparse" : "dense");
  out.add("folded", plan.fold > 0);
  out.add("lanes", kernels.lanes);
  out.add("column_classes", plan.classes.size());
  out.add("strands", strands);
  out.add("taps", widest_strand(plan));
  out.add("feature_vectors", plan.vectors);
  out.add("last_feature_vectors", plan.last_vectors);
  out.add("feature_blocks", plan.blocks);
  out.add("channel_block", plan.channel_block);
  out.add("tile_rows", plan.tile_rows);
  out.add("tile_columns", plan.tile_columns);
  out.add("tiles", plan.tiles());
  out.add("shares_of_two_threads", plan.shares(2));
  out.add("copy", plan.copy);
  out.add("packs", plan.packs);
  out.add("tall", plan.tall);
  out.add("stream", plan.stream);
  out.add("serial", plan.serial);
  out.add("dense_density", plan.dense_density);
  out.add("pair_density", plan.pair_density);
  out.add("break_even_density", break_even([&](double d) { return d < plan_of(d).dense_density; }));
  return out;
}

}  // namespace sparsetrain
