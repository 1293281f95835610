// Does instructions that the processor lacks in its place: AMX, and AVX-VNNI. Each traps, and the handler does what Intel's
// manual (Software Developer's Manual, volume 2) says of it. So the library's own machine code runs, and not a stand-in
// for it. What this does not take is illegal as before.
#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <ucontext.h>

namespace {
// --- tiles of AMX ---------------------------------------------------------------------------------------------------
struct Tiles {
  struct {
    uint8_t palette, start, unused[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } shapes;
  uint8_t row[8][16][64];
};
thread_local Tiles tiles;
struct sigaction before;
std::atomic<int64_t> products[3]; // of signed and unsigned bytes, of unsigned and signed ones, of bfloat16

bool set_shapes(const void *from) {
  Tiles fresh = {};
  memcpy(&fresh.shapes, from, 64);
  if (fresh.shapes.palette != 1 || fresh.shapes.start)
    return false;
  for (int t = 0; t < 16; t++) // eight tiles there are; none may be larger than it can be
    if (fresh.shapes.row_bytes[t] > (t < 8 ? 64 : 0) || fresh.shapes.rows[t] > (t < 8 ? 16 : 0))
      return false;
  for (int i = 0; i < 14; i++)
    if (fresh.shapes.unused[i])
      return false;
  tiles = fresh;
  return true;
}
bool is_set(int t) { return tiles.shapes.palette && tiles.shapes.rows[t] && tiles.shapes.row_bytes[t]; }

float number(uint32_t bits) {
  if (!(bits & 0x7f800000)) // subnormal numbers are zero
    bits &= 0x80000000;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

float flushed(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return number(bits);
}

// sums [m][n] += a [m][k] times b [k][n], k in words of four bytes or of two bfloat16
bool multiply(int sums, int a, int b, int prefix, bool bytes) {
  const int m = tiles.shapes.rows[a], k = tiles.shapes.row_bytes[a] / 4, n = tiles.shapes.row_bytes[b] / 4;
  const bool fit = is_set(sums) && is_set(a) && is_set(b) && tiles.shapes.rows[sums] == m &&
                   tiles.shapes.rows[b] == k && tiles.shapes.row_bytes[sums] == 4 * n &&
                   tiles.shapes.row_bytes[a] % 4 == 0 && sums != a && sums != b && a != b;
  if (!fit)
    return false;
  if (!bytes || prefix == 1 || prefix == 2)
    products[!bytes ? 2 : prefix == 1]++;
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      uint8_t *out = tiles.row[sums][i] + 4 * j;
      if (bytes) {
        const bool signed_a = prefix == 3 || prefix == 2, signed_b = prefix == 3 || prefix == 1; // F2, F3; F2, 66
        uint32_t sum;
        memcpy(&sum, out, 4);
        for (int x = 0; x < 4 * k; x++) {
          const uint8_t p = tiles.row[a][i][x], q = tiles.row[b][x / 4][4 * j + x % 4];
          sum += (uint32_t)((signed_a ? (int8_t)p : p) * (signed_b ? (int8_t)q : q));
        }
        memcpy(out, &sum, 4);
      } else {
        float sum;
        memcpy(&sum, out, 4);
        float even = 0, odd = 0;
        for (int x = 0; x < k; x++) {
          uint32_t p, q;
          memcpy(&p, tiles.row[a][i] + 4 * x, 4);
          memcpy(&q, tiles.row[b][x] + 4 * j, 4);
          even = flushed(__builtin_fmaf(number(p << 16), number(q << 16), even));
          odd = flushed(__builtin_fmaf(number(p & 0xffff0000), number(q & 0xffff0000), odd));
        }
        sum = flushed(flushed(sum) + flushed(even + odd));
        memcpy(out, &sum, 4);
      }
    }
  return true;
}

const int ORDER[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                       REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// An instruction with three bytes of VEX, of the table 0F 38, W 0.
struct Instruction {
  int prefix, wide, operation, mode, reg, other, third; // prefix: none, 66, F3, F2
  int length;
  uint8_t *base;  // of an operand in memory
  int64_t apart;  // index * scale
  bool indexed, relative;

  Instruction(const uint8_t *code, const greg_t *registers) : length(0), base(nullptr), apart(0) {
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x80))
      return;
    prefix = code[2] & 3, wide = code[2] >> 2 & 1, third = ~code[2] >> 3 & 15, operation = code[3];
    const int modes = code[4];
    mode = modes >> 6, reg = (modes >> 3 & 7) | (code[1] & 0x80 ? 0 : 8);
    other = (modes & 7) | (code[1] & 0x20 ? 0 : 8);
    indexed = mode != 3 && (modes & 7) == 4, relative = mode == 0 && (modes & 7) == 5;
    length = 5;
    if (mode == 3)
      return;
    int from = other;
    if (indexed) {
      from = (code[5] & 7) | (code[1] & 0x20 ? 0 : 8), length = 6;
      const int index = (code[5] >> 3 & 7) | (code[1] & 0x40 ? 0 : 8);
      apart = index == 4 ? 0 : (int64_t)((uint64_t)registers[ORDER[index]] << (code[5] >> 6));
    }
    const bool nowhere = indexed && mode == 0 && (from & 7) == 5;
    int64_t displacement = 0;
    if (mode == 1)
      displacement = (int8_t)code[length], length += 1;
    else if (mode == 2 || nowhere || relative) {
      int32_t far;
      memcpy(&far, code + length, 4);
      displacement = far, length += 4;
    }
    const int64_t start = relative ? (int64_t)code + length : nowhere ? 0 : registers[ORDER[from]];
    base = (uint8_t *)(start + displacement);
  }
};

// --- AMX ------------------------------------------------------------------------------------------------------------
bool do_tiles(const Instruction &i) {
  if (i.wide)
    return false;
  if (i.mode == 3) {
    if (i.operation == 0x49 && i.prefix == 0 && !i.reg && !i.other && !i.third) { // tilerelease
      memset(&tiles, 0, sizeof(tiles));
      return true;
    }
    if (i.reg > 7 || i.other > 7 || i.third > 7)
      return false;
    if (i.operation == 0x49 && i.prefix == 3 && !i.other) { // tilezero
      memset(tiles.row[i.reg], 0, sizeof(tiles.row[i.reg]));
      return is_set(i.reg);
    }
    const bool product = i.operation == 0x5e || (i.operation == 0x5c && i.prefix == 2);
    return product && multiply(i.reg, i.other, i.third, i.prefix, i.operation == 0x5e);
  }
  if (i.third)
    return false;
  if (i.operation == 0x49 && i.prefix == 0 && !i.reg) // ldtilecfg
    return set_shapes(i.base + i.apart);
  if (i.operation != 0x4b || !i.indexed || i.reg > 7 || !is_set(i.reg))
    return false;
  const int rows = tiles.shapes.rows[i.reg], bytes = tiles.shapes.row_bytes[i.reg];
  if (i.prefix == 3 || i.prefix == 1) { // tileloadd, tileloaddt1: what the shape leaves out becomes zero
    memset(tiles.row[i.reg], 0, sizeof(tiles.row[i.reg]));
    for (int r = 0; r < rows; r++)
      memcpy(tiles.row[i.reg][r], i.base + r * i.apart, bytes);
    return true;
  }
  if (i.prefix == 2) // tilestored
    for (int r = 0; r < rows; r++)
      memcpy(i.base + r * i.apart, tiles.row[i.reg][r], bytes);
  return i.prefix == 2;
}

// --- AVX-VNNI -------------------------------------------------------------------------------------------------------
// A register of 32 bytes as a signal leaves it in memory: the low halves where FXSAVE has them, the high ones behind the
// header of XSAVE.
struct Registers {
  uint8_t *state;
  uint64_t *there() const { return (uint64_t *)(state + 512); }
  void load(int n, uint8_t *x) const {
    memset(x, 0, 32);
    if (*there() & 2)
      memcpy(x, state + 160 + 16 * n, 16);
    if (*there() & 4)
      memcpy(x + 16, state + 576 + 16 * n, 16);
  }
  void store(int n, const uint8_t *x) const {
    for (uint64_t part = 2; part <= 4; part *= 2)
      if (!(*there() & part))
        memset(state + (part == 2 ? 160 : 576), 0, 256);
    *there() |= 6;
    memcpy(state + 160 + 16 * n, x, 16), memcpy(state + 576 + 16 * n, x + 16, 16);
  }
};

bool do_bytes(const Instruction &i, const Registers &registers) { // vpdpbusd of 32 bytes
  if (i.operation != 0x50 || i.prefix != 1 || !i.wide)
    return false;
  uint8_t sums[32], a[32], b[32];
  registers.load(i.reg, sums), registers.load(i.third, a);
  if (i.mode == 3)
    registers.load(i.other, b);
  else
    memcpy(b, i.base + i.apart, 32);
  for (int lane = 0; lane < 8; lane++) {
    uint32_t sum;
    memcpy(&sum, sums + 4 * lane, 4);
    for (int x = 4 * lane; x < 4 * lane + 4; x++)
      sum += (uint32_t)(a[x] * (int8_t)b[x]);
    memcpy(sums + 4 * lane, &sum, 4);
  }
  registers.store(i.reg, sums);
  return true;
}

void trapped(int signal, siginfo_t *info, void *context) {
  mcontext_t &machine = ((ucontext_t *)context)->uc_mcontext;
  const Instruction i((const uint8_t *)machine.gregs[REG_RIP], machine.gregs);
  if (i.length && (do_tiles(i) || do_bytes(i, {(uint8_t *)machine.fpregs})))
    machine.gregs[REG_RIP] += i.length;
  else
    sigaction(SIGILL, &before, nullptr); // the instruction comes again, and dies as it would have
}

__attribute__((constructor)) void begin() {
  struct sigaction action = {};
  action.sa_sigaction = trapped;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  sigaction(SIGILL, &action, &before);
}
} // namespace

extern "C" __attribute__((visibility("default"))) int64_t tile_products(int kind) { return products[kind]; }
