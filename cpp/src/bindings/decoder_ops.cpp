#include "bindings/ops.hpp"
#include "moecore/embedding.hpp"
#include "moecore/rms_norm.hpp"
#include "moecore/rotary_embedding.hpp"

namespace py = pybind11;

namespace moecore::bindings {

void bind_decoder_ops(py::module_& module) {
    module.def("rms_norm", [](py::handle input, py::handle weight, float eps, py::handle residual,
                              py::handle output) {
        constexpr const char* kOp = "rms_norm";
        const TensorArg x(input, kOp, "input");
        const TensorArg w(weight, kOp, "weight");
        const TensorArg res(residual, kOp, "residual", true);
        const TensorArg out(output, kOp, "output");
        py::gil_scoped_release release;
        rms_norm(x, w, eps, res, out, x.current_stream());
    });

    module.def("rotary_embedding",
               [](py::handle x, py::handle positions, py::handle cos_sin, bool interleaved) {
                   constexpr const char* kOp = "rotary_embedding";
                   const TensorArg rows(x, kOp, "x");
                   const TensorArg ids(positions, kOp, "positions");
                   const TensorArg table(cos_sin, kOp, "cos_sin");
                   py::gil_scoped_release release;
                   rotary_embedding(rows, ids, table,
                                    interleaved ? RotaryPairs::kInterleaved : RotaryPairs::kHalves,
                                    rows.current_stream());
               });

    module.def("embedding", [](py::handle ids, py::handle weight, py::handle output) {
        constexpr const char* kOp = "embedding";
        const TensorArg rows(ids, kOp, "ids");
        const WeightsArg w(weight, kOp, "weight");
        const TensorArg out(output, kOp, "output");
        py::gil_scoped_release release;
        embedding(rows, w.weights(), out, rows.current_stream());
    });
}

}  // namespace moecore::bindings
