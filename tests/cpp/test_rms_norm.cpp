#include "moecore/rms_norm.hpp"

#include <functional>

#include "moecore/threads.hpp"
#include "test_main.hpp"

namespace moecore::test {
namespace {

double round_to(DType dtype, double value) {
    Array one(dtype, 1);
    one.set(0, value);
    return one[0];
}

void check_rms_norm(DType dtype, DType weight_dtype, int64_t num_rows, int64_t width, int64_t gap,
                    bool with_residual) {
    Random random(static_cast<uint32_t>(width * 7 + num_rows));
    const int64_t stride = width + gap, size = strided_size(num_rows, width, stride);
    Array input = random.array(dtype, size), weight = random.array(weight_dtype, width);
    Array residual = random.array(dtype, size), output(dtype, size);
    const Array before = residual;
    const double eps = 1e-5;
    set_num_threads(2);
    rms_norm(input.rows(num_rows, width, stride), weight.view({width}), static_cast<float>(eps),
             with_residual ? residual.rows(num_rows, width, stride) : TensorView{},
             output.rows(num_rows, width, stride));
    for (int64_t r = 0; r < num_rows; ++r) {
        double squares = 0;
        const auto x = [&](int64_t c) {
            const int64_t i = r * stride + c;
            return with_residual ? round_to(dtype, static_cast<float>(input[i]) +
                                                       static_cast<float>(before[i]))
                                 : input[i];
        };
        for (int64_t c = 0; c < width; ++c) squares += x(c) * x(c);
        const double scale = 1.0 / std::sqrt(squares / static_cast<double>(width) + eps);
        for (int64_t c = 0; c < width; ++c) {
            const std::string what = concat("row ", r, " column ", c, " of ", width);
            if (with_residual) expect(residual[r * stride + c] == x(c), "residual, " + what);
            // The inner rounding costs one more rounding of the result, the sum a few of float32.
            const double wanted = weight[c] * x(c) * scale;
            const double inner = dtype == kBf16 ? 0x1p-8 : 0x1p-24;
            const double sum = static_cast<double>(width / 64 + 16) * kEps;
            expect_close(output[r * stride + c], wanted, std::abs(wanted) * (inner + sum), dtype,
                         what);
        }
    }
}

void test_rms_norm_is_right() {
    const std::pair<DType, DType> dtypes[] = {{kF32, kF32}, {kBf16, kBf16}, {kBf16, kF32}};
    for (const auto& [dtype, weight_dtype] : dtypes)
        for (const int64_t width : {1, 15, 17, 63, 64, 65, 130})
            for (const int64_t num_rows : {0, 1, 300})
                for (const int64_t gap : {0, 5})
                    for (const bool with_residual : {false, true})
                        check_rms_norm(dtype, weight_dtype, num_rows, width, gap, with_residual);
}

void test_rms_norm_names_the_bad_argument() {
    Array input(kF32, 24), weight(kF32, 24), residual(kF32, 24), output(kF32, 24);
    struct Arguments {
        TensorView input, weight, residual, output;
        float eps = 1e-6f;
    };
    const Arguments good{input.view({2, 3, 4}), weight.view({4}), residual.view({2, 3, 4}),
                         output.view({2, 3, 4})};
    const auto call = [](const Arguments& a) {
        rms_norm(a.input, a.weight, a.eps, a.residual, a.output);
    };
    call(good);
    const auto bad = [&](const std::function<void(Arguments&)>& change, const char* text,
                         std::source_location where = std::source_location::current()) {
        Arguments a = good;
        change(a);
        expect_invalid([&] { call(a); }, std::string("rms_norm: ") + text, where);
    };
    bad([](auto& a) { a.input = {}; }, "input must");
    bad([](auto& a) { a.input.dtype = DType::kInt32; }, "input must");
    bad([](auto& a) { a.input.strides[1] = -4; }, "input must");
    bad([](auto& a) { a.eps = -1; }, "eps must");
    bad([](auto& a) { a.weight.shape[0] = 3; }, "weight must");
    bad([](auto& a) { a.weight.strides[0] = -1; }, "weight must");
    bad([](auto& a) { a.weight.device = kOtherDevice; }, "weight must");
    bad([](auto& a) { a.residual.dtype = kBf16; }, "residual must");
    bad([](auto& a) { a.residual.shape[1] = 2; }, "residual must");
    bad([](auto& a) { a.residual.device = kOtherDevice; }, "residual must");
    bad([](auto& a) { a.residual.data = a.input.data; }, "residual must not overlap input");
    bad([](auto& a) { a.residual.data = a.weight.data; }, "residual must not overlap weight");
    bad([](auto& a) { a.output = {}; }, "output must");
    bad([](auto& a) { a.output.strides[0] = -12; }, "output must");
    bad([](auto& a) { a.output.data = a.residual.data; }, "output must not overlap residual");
    bad([](auto& a) { a.output.data = a.weight.data; }, "output must not overlap weight");
    bad([](Arguments& a) { a.output.data = a.input.as<float>() + 1; },
        "output must not overlap input");
}

}  // namespace

void add_rms_norm_tests(std::vector<Test>& tests) {
    tests.insert(tests.end(),
                 {{"rms_norm_is_right", test_rms_norm_is_right},
                  {"rms_norm_names_the_bad_argument", test_rms_norm_names_the_bad_argument}});
}

}  // namespace moecore::test
