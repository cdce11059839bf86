#include <iostream>
#include <vector>

#include "moecore/grouped_gemm.hpp"
#include "moecore/version.hpp"

int main() {
    using namespace moecore;
    std::vector<float> input = {1, 2, 3, 4}, weight = {1, 0, 0, 1, 1, 1}, output(6);
    linear(TensorView(input.data(), DType::kFloat32, {2, 2}),
           TensorView(weight.data(), DType::kFloat32, {3, 2}), {}, {},
           TensorView(output.data(), DType::kFloat32, {2, 3}));
    if (output != std::vector<float>{1, 2, 3, 3, 4, 7}) return 1;
    std::cout << "moecore " << kVersion << " works\n";
}
