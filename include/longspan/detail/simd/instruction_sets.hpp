// The instruction sets that a translation unit is compiled for, as part of a name: x86-64-v3 is _x3, x86-64-v3 with
// AVX512F is _x3_512f.
//
// A compiler may use any enabled instruction set anywhere, even in arithmetic on indices. The name therefore
// distinguishes all sets that compilers use on their own, not only those that the kernels use explicitly.
#pragma once

/// LONGSPAN_ABI_WHEN(__AVX2__, _avx2) is _avx2 where __AVX2__ is 1, and nothing otherwise.
#define LONGSPAN_ABI_PROBE_1 ~,
#define LONGSPAN_ABI_SECOND(a, b, ...) b
#define LONGSPAN_ABI_SECOND_OF(...) LONGSPAN_ABI_SECOND(__VA_ARGS__)
#define LONGSPAN_ABI_PASTED_WHEN(value, name) LONGSPAN_ABI_SECOND_OF(LONGSPAN_ABI_PROBE_##value name, , ~)
#define LONGSPAN_ABI_WHEN(macro, name) LONGSPAN_ABI_PASTED_WHEN(macro, name)

/// Joins eight parts, each of which may be empty, into one name.
#define LONGSPAN_ABI_PASTE(a, b, c, d, e, f, g, h) a##b##c##d##e##f##g##h
#define LONGSPAN_ABI_JOIN(a, b, c, d, e, f, g, h) LONGSPAN_ABI_PASTE(a, b, c, d, e, f, g, h)

#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__) || defined(_M_IX86)

// The highest complete level of the x86-64 psABI. Instruction sets beyond it follow by name.
#if defined(__SSE3__) && defined(__SSSE3__) && defined(__SSE4_1__) && defined(__SSE4_2__) && \
    defined(__POPCNT__)
#define LONGSPAN_ABI_IS_V2 1
#else
#define LONGSPAN_ABI_IS_V2 0
#endif
#if LONGSPAN_ABI_IS_V2 && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && defined(__BMI__) && \
    defined(__BMI2__) && defined(__LZCNT__) && defined(__MOVBE__)
#define LONGSPAN_ABI_IS_V3 1
#else
#define LONGSPAN_ABI_IS_V3 0
#endif
#if LONGSPAN_ABI_IS_V3 && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512CD__) && \
    defined(__AVX512DQ__) && defined(__AVX512VL__)
#define LONGSPAN_ABI_IS_V4 1
#else
#define LONGSPAN_ABI_IS_V4 0
#endif

#if LONGSPAN_ABI_IS_V2
#define LONGSPAN_ABI_BEYOND_V1
#else
#define LONGSPAN_ABI_BEYOND_V1                                                                    \
  LONGSPAN_ABI_JOIN(LONGSPAN_ABI_WHEN(__SSE3__, _sse3), LONGSPAN_ABI_WHEN(__SSSE3__, _ssse3),     \
                    LONGSPAN_ABI_WHEN(__SSE4_1__, _sse41), LONGSPAN_ABI_WHEN(__SSE4_2__, _sse42), \
                    LONGSPAN_ABI_WHEN(__POPCNT__, _popcnt), LONGSPAN_ABI_WHEN(__CRC32__, _crc32), , )
#endif
#if LONGSPAN_ABI_IS_V3
#define LONGSPAN_ABI_BEYOND_V2
#else
#define LONGSPAN_ABI_BEYOND_V2                                                            \
  LONGSPAN_ABI_JOIN(LONGSPAN_ABI_WHEN(__AVX__, _avx), LONGSPAN_ABI_WHEN(__AVX2__, _avx2), \
                    LONGSPAN_ABI_WHEN(__FMA__, _fma), LONGSPAN_ABI_WHEN(__F16C__, _f16c), \
                    LONGSPAN_ABI_WHEN(__BMI__, _bmi), LONGSPAN_ABI_WHEN(__BMI2__, _bmi2), \
                    LONGSPAN_ABI_WHEN(__LZCNT__, _lzcnt), LONGSPAN_ABI_WHEN(__MOVBE__, _movbe))
#endif
#if LONGSPAN_ABI_IS_V4
#define LONGSPAN_ABI_BEYOND_V3
#else
#define LONGSPAN_ABI_BEYOND_V3                                                                   \
  LONGSPAN_ABI_JOIN(LONGSPAN_ABI_WHEN(__AVX512F__, _512f), LONGSPAN_ABI_WHEN(__AVX512BW__, _bw), \
                    LONGSPAN_ABI_WHEN(__AVX512CD__, _cd), LONGSPAN_ABI_WHEN(__AVX512DQ__, _dq),  \
                    LONGSPAN_ABI_WHEN(__AVX512VL__, _vl), , , )
#endif

// The AVX-512 integer subsets that Ice Lake and Zen 4 introduced together.
#if defined(__AVX512VBMI__) && defined(__AVX512VBMI2__) && defined(__AVX512IFMA__) && \
    defined(__AVX512VNNI__) && defined(__AVX512BITALG__) && defined(__AVX512VPOPCNTDQ__)
#define LONGSPAN_ABI_ICE_LAKE _icl
#else
#define LONGSPAN_ABI_ICE_LAKE                                                                             \
  LONGSPAN_ABI_JOIN(LONGSPAN_ABI_WHEN(__AVX512VBMI__, _vbmi), LONGSPAN_ABI_WHEN(__AVX512VBMI2__, _vbmi2), \
                    LONGSPAN_ABI_WHEN(__AVX512IFMA__, _ifma), LONGSPAN_ABI_WHEN(__AVX512VNNI__, _vnni),   \
                    LONGSPAN_ABI_WHEN(__AVX512BITALG__, _bitalg),                                         \
                    LONGSPAN_ABI_WHEN(__AVX512VPOPCNTDQ__, _vpopcnt),                                     \
                    LONGSPAN_ABI_WHEN(__AVX512ER__, _er), )
#endif
#define LONGSPAN_ABI_BEYOND_LEVELS                                                                           \
  LONGSPAN_ABI_JOIN(LONGSPAN_ABI_WHEN(__AVX512BF16__, _bf16), LONGSPAN_ABI_WHEN(__AVX512FP16__, _fp16),      \
                    LONGSPAN_ABI_WHEN(__AVXVNNI__, _avxvnni), LONGSPAN_ABI_WHEN(__AVXVNNIINT8__, _vnniint8), \
                    LONGSPAN_ABI_WHEN(__AVXIFMA__, _avxifma), LONGSPAN_ABI_WHEN(__GFNI__, _gfni),            \
                    LONGSPAN_ABI_WHEN(__APX_F__, _apx), LONGSPAN_ABI_WHEN(__AVX10_2__, _avx10))
// Matrix tiles with bfloat16 products; clang before version 16 spells the macros without the second underscore. Only
// 64-bit Linux has the permission that they need.
#if defined(__linux__) && defined(__x86_64__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    ((defined(__AMX_TILE__) && defined(__AMX_BF16__)) || (defined(__AMXTILE__) && defined(__AMXBF16__)))
#define LONGSPAN_TARGETS_AMX 1
#endif
#if defined(LONGSPAN_EMULATE_AMX)
#define LONGSPAN_ABI_AMX_EMULATED _amxemulated
#else
#define LONGSPAN_ABI_AMX_EMULATED
#endif
#define LONGSPAN_ABI_AMX                                                                                  \
  LONGSPAN_ABI_JOIN(LONGSPAN_ABI_WHEN(__AMX_TILE__, _amx), LONGSPAN_ABI_WHEN(__AMX_BF16__, _amxbf16),     \
                    LONGSPAN_ABI_WHEN(__AMX_INT8__, _amxint8), LONGSPAN_ABI_WHEN(__AMX_FP16__, _amxfp16), \
                    LONGSPAN_ABI_WHEN(__AMXTILE__, _amx), LONGSPAN_ABI_WHEN(__AMXBF16__, _amxbf16),       \
                    LONGSPAN_ABI_WHEN(__AMXINT8__, _amxint8), LONGSPAN_ABI_AMX_EMULATED)

#define LONGSPAN_ABI_AMD                                                                    \
  LONGSPAN_ABI_JOIN(LONGSPAN_ABI_WHEN(__SSE4A__, _sse4a), LONGSPAN_ABI_WHEN(__XOP__, _xop), \
                    LONGSPAN_ABI_WHEN(__FMA4__, _fma4), LONGSPAN_ABI_WHEN(__TBM__, _tbm), , , , )

#if LONGSPAN_ABI_IS_V4
#define LONGSPAN_ABI_LEVEL _x4
#elif LONGSPAN_ABI_IS_V3
#define LONGSPAN_ABI_LEVEL _x3
#elif LONGSPAN_ABI_IS_V2
#define LONGSPAN_ABI_LEVEL _x2
#elif defined(__SSE2__) || defined(_M_X64)
#define LONGSPAN_ABI_LEVEL _x1
#else
#define LONGSPAN_ABI_LEVEL _x0
#endif
#define LONGSPAN_ABI_ISA                                                                       \
  LONGSPAN_ABI_JOIN(LONGSPAN_ABI_LEVEL, LONGSPAN_ABI_BEYOND_V1, LONGSPAN_ABI_BEYOND_V2,        \
                    LONGSPAN_ABI_BEYOND_V3, LONGSPAN_ABI_ICE_LAKE, LONGSPAN_ABI_BEYOND_LEVELS, \
                    LONGSPAN_ABI_AMX, LONGSPAN_ABI_AMD)

#elif defined(__aarch64__) || defined(__arm__) || defined(_M_ARM64)

#if defined(__ARM_ARCH)
#define LONGSPAN_ABI_ARCHITECTURE __ARM_ARCH
#else
#define LONGSPAN_ABI_ARCHITECTURE
#endif
#if defined(__ARM_FEATURE_SVE_BITS) && __ARM_FEATURE_SVE_BITS + 0 > 0
#define LONGSPAN_ABI_SVE_BITS __ARM_FEATURE_SVE_BITS
#else
#define LONGSPAN_ABI_SVE_BITS
#endif
#define LONGSPAN_ABI_NEON                                                                             \
  LONGSPAN_ABI_JOIN(LONGSPAN_ABI_WHEN(__ARM_NEON, _neon), LONGSPAN_ABI_WHEN(__ARM_FEATURE_FMA, _fma), \
                    LONGSPAN_ABI_WHEN(__ARM_FEATURE_DOTPROD, _dotprod),                               \
                    LONGSPAN_ABI_WHEN(__ARM_FEATURE_MATMUL_INT8, _i8mm),                              \
                    LONGSPAN_ABI_WHEN(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC, _bf16),                   \
                    LONGSPAN_ABI_WHEN(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC, _fp16),                   \
                    LONGSPAN_ABI_WHEN(__ARM_FEATURE_FP16_FML, _fhm),                                  \
                    LONGSPAN_ABI_WHEN(__ARM_FEATURE_CRC32, _crc32))
#define LONGSPAN_ABI_SVE                                                               \
  LONGSPAN_ABI_JOIN(LONGSPAN_ABI_WHEN(__ARM_FEATURE_SVE, _sve), LONGSPAN_ABI_SVE_BITS, \
                    LONGSPAN_ABI_WHEN(__ARM_FEATURE_SVE2, _sve2),                      \
                    LONGSPAN_ABI_WHEN(__ARM_FEATURE_SME, _sme),                        \
                    LONGSPAN_ABI_WHEN(__ARM_FEATURE_ATOMICS, _lse), , , )
#define LONGSPAN_ABI_ISA \
  LONGSPAN_ABI_JOIN(_arm, LONGSPAN_ABI_ARCHITECTURE, LONGSPAN_ABI_NEON, LONGSPAN_ABI_SVE, , , , )

#else

#define LONGSPAN_ABI_ISA                                                                               \
  LONGSPAN_ABI_JOIN(_base, LONGSPAN_ABI_WHEN(_ARCH_PWR8, _pwr8), LONGSPAN_ABI_WHEN(_ARCH_PWR9, _pwr9), \
                    LONGSPAN_ABI_WHEN(_ARCH_PWR10, _pwr10), LONGSPAN_ABI_WHEN(__VSX__, _vsx),          \
                    LONGSPAN_ABI_WHEN(__riscv_vector, _rvv), LONGSPAN_ABI_WHEN(__loongarch_sx, _lsx),  \
                    LONGSPAN_ABI_WHEN(__loongarch_asx, _lasx))

#endif
