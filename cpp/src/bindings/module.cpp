#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/ops.hpp"
#include "moecore/build_info.hpp"
#include "moecore/error.hpp"
#include "moecore/threads.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_core, module) {
    module.doc() = "The native core of moecore. Use moecore.ops and moecore.MoELayer.";

    // InvalidArgument is a std::invalid_argument: pybind11 makes it a ValueError by itself.
    py::register_exception<moecore::UnsupportedError>(module, "UnsupportedError",
                                                      PyExc_NotImplementedError);
    py::register_exception<moecore::CudaError>(module, "CudaError", PyExc_RuntimeError);

    module.def("build_info", [] {
        const moecore::BuildInfo info = moecore::build_info();
        py::dict result;
        result["version"] = info.version;
        result["compiler"] = info.compiler;
        result["has_cuda"] = info.has_cuda;
        result["cuda_version"] = info.cuda_version;
        result["cpu_isas"] = info.cpu_isas;
        result["cpu_isa"] = info.cpu_isa;
        result["cpu_isa_denied"] = info.cpu_isa_denied;
        return result;
    });
    module.def("set_num_threads", &moecore::set_num_threads, py::arg("num_threads"));
    module.def("num_threads", &moecore::num_threads);

    moecore::bindings::bind_ops(module);
    moecore::bindings::bind_decoder_ops(module);
    moecore::bindings::bind_transport(module);
    moecore::bindings::bind_moe_layer(module);
    moecore::bindings::bind_decoder_layer(module);
    moecore::bindings::bind_decoder(module);
}
