#pragma once

namespace moecore {

/// Threads that CPU ops use. 0, the default, follows OpenMP (OMP_NUM_THREADS, and
/// torch.set_num_threads where torch shares the process's OpenMP library).
/// Throws InvalidArgument unless num_threads >= 0. Process-wide; no op's result depends on it.
void set_num_threads(int num_threads);

/// The number of threads the next CPU op will use.
int num_threads();

}  // namespace moecore
