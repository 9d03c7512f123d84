// out_of_line.cuh: large device functions that several places call. Inlined they cost minutes of
// ptxas: rank.cu took more than ten, and takes two and a half.
#pragma once

#define THINKV_OUT_OF_LINE __attribute__((noinline))
