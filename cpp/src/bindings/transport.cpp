#include "bindings/transport.hpp"

#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "bindings/ops.hpp"

namespace py = pybind11;

namespace moecore::bindings {

PyTransport::PyTransport(std::unique_ptr<Transport> transport)
    : transport_(std::move(transport)), ranks_(std::make_unique<ExpertParallel>(*transport_)) {}

Transport& PyTransport::transport() const {
    require(transport_ != nullptr, "Transport: it must be open, got a closed one");
    return *transport_;
}

ExpertParallel& PyTransport::ranks() const {
    transport();
    return *ranks_;
}

std::unique_ptr<Transport> PyTransport::release() {
    transport();
    ranks_.reset();
    return std::move(transport_);
}

void PyTransport::close() {
    ranks_.reset();
    transport_.reset();
}

namespace {

/// moecore.TransportError, with the attributes rank and phase.
void register_transport_error(py::module_& module) {
    static PyObject* type =
        PyErr_NewException("moecore._core.TransportError", PyExc_RuntimeError, nullptr);
    module.attr("TransportError") = py::handle(type);
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const TransportError& error) {
            const py::object value = py::handle(type)(error.what());
            value.attr("rank") = error.rank();
            value.attr("phase") = error.phase();
            PyErr_SetObject(type, value.ptr());
        }
    });
}

/// Bytes of a contiguous array of Python; `name` goes into the message.
py::buffer_info bytes_of(const py::buffer& buffer, const char* name, bool writable) {
    py::buffer_info info = buffer.request(writable);
    py::ssize_t stride = info.itemsize;
    for (py::ssize_t d = info.ndim; d-- > 0;) {
        const auto i = static_cast<size_t>(d);
        require(info.shape[i] == 1 || info.strides[i] == stride, "Transport.all_gather: ", name,
                " must be contiguous, got other strides");
        stride *= info.shape[i];
    }
    return info;
}

void all_gather(const PyTransport& self, const std::string& phase, const py::buffer& mine,
                const py::buffer& all) {
    const py::buffer_info from = bytes_of(mine, "mine", false);
    const py::buffer_info to = bytes_of(all, "all", true);
    const py::ssize_t bytes = from.size * from.itemsize;
    const int size = self.transport().size();
    require(to.size * to.itemsize == bytes * size, "Transport.all_gather: all must have ",
            bytes * size, " bytes, got ", to.size * to.itemsize);
    const py::gil_scoped_release release;
    self.transport().all_gather(phase.c_str(), from.ptr, to.ptr, static_cast<size_t>(bytes));
}

}  // namespace

void bind_transport(py::module_& module) {
    register_transport_error(module);
    module.def("expert_range", [](int num_experts, int rank, int size) {
        const ExpertRange range = expert_range(num_experts, rank, size);
        return std::pair(range.first, range.count);
    });
    py::class_<PyTransport>(module, "Transport")
        .def_static("loopback",
                    [] { return std::make_unique<PyTransport>(make_loopback_transport()); })
        .def_static("in_process",
                    [](int size, const std::optional<int>& cuda_device) {
                        const Device device =
                            cuda_device ? Device{DeviceType::kCuda, *cuda_device} : Device{};
                        std::vector<std::unique_ptr<PyTransport>> result;
                        for (auto& transport : make_in_process_transports(size, device))
                            result.push_back(std::make_unique<PyTransport>(std::move(transport)));
                        return result;
                    })
        .def_static("shm",
                    [](const std::string& name, int rank, int size, double connect_deadline,
                       size_t ring_bytes) {
                        const py::gil_scoped_release release;
                        return std::make_unique<PyTransport>(
                            make_shm_transport({.name = name,
                                                .rank = rank,
                                                .size = size,
                                                .connect_deadline = connect_deadline,
                                                .ring_bytes = ring_bytes}));
                    })
        .def_static("nccl_unique_id",
                    [](const std::vector<std::string>& library_paths) {
                        return py::bytes(nccl_unique_id(library_paths));
                    })
        .def_static(
            "nccl",
            [](const py::bytes& unique_id, int rank, int size, int cuda_device,
               double connect_deadline, const std::vector<std::string>& library_paths,
               const py::object& hosts) {
                NcclOptions options{.unique_id = unique_id,
                                    .rank = rank,
                                    .size = size,
                                    .device = {DeviceType::kCuda, cuda_device},
                                    .connect_deadline = connect_deadline,
                                    .library_paths = library_paths};
                if (!hosts.is_none()) options.hosts = hosts.cast<PyTransport&>().release();
                const py::gil_scoped_release release;
                return std::make_unique<PyTransport>(make_nccl_transport(std::move(options)));
            })
        .def_static(
            "peer",
            [](PyTransport& hosts, int cuda_device) {
                PeerOptions options{.hosts = hosts.release(),
                                    .device = {DeviceType::kCuda, cuda_device}};
                const py::gil_scoped_release release;
                return std::make_unique<PyTransport>(make_peer_transport(std::move(options)));
            })
        .def_property_readonly("rank", [](const PyTransport& t) { return t.transport().rank(); })
        .def_property_readonly("size", [](const PyTransport& t) { return t.transport().size(); })
        .def_property_readonly("kind", [](const PyTransport& t) { return t.transport().kind(); })
        .def_property(
            "deadline", [](const PyTransport& t) { return t.transport().deadline(); },
            [](const PyTransport& t, double seconds) { t.transport().set_deadline(seconds); })
        .def("barrier",
             [](const PyTransport& t, const std::string& phase) {
                 Transport& transport = t.transport();
                 const py::gil_scoped_release release;
                 transport.barrier(phase.c_str());
             })
        .def("all_gather", &all_gather)
        .def_property_readonly("cuda_device",
                               [](const PyTransport& t) -> std::optional<int> {
                                   const Device device = t.transport().device();
                                   if (device.type != DeviceType::kCuda) return std::nullopt;
                                   return device.index;
                               })
        .def("synchronize",
             [](const PyTransport& t, const std::string& phase, uintptr_t stream) {
                 Transport& transport = t.transport();
                 const py::gil_scoped_release release;
                 transport.synchronize(phase.c_str(), {reinterpret_cast<void*>(stream)});
             })
        .def("measure",
             [](const PyTransport& t) {
                 const py::gil_scoped_release release;
                 t.ranks().measure();
             })
        .def_property_readonly("figures",
                               [](const PyTransport& t) {
                                   const MachineFigures& figures = t.ranks().figures();
                                   py::dict result;
                                   result["link_gbps"] = figures.link_gbps;
                                   result["link_latency_us"] = figures.link_latency_us;
                                   return result;
                               })
        .def_property_readonly("last_choice",
                               [](const PyTransport& t) { return t.ranks().last_choice().reason; })
        .def_property_readonly("can_capture",
                               [](const PyTransport& t) { return t.transport().can_capture(); })
        .def("fix_tokens",
             [](const PyTransport& t, int64_t tokens) { t.ranks().fix_tokens(tokens); })
        .def("start_trace", [](const PyTransport& t) { t.ranks().start_trace(); })
        .def("trace_events", [](const PyTransport& t) { return t.ranks().trace_events(); })
        .def("abort",
             [](const PyTransport& t, const std::string& reason) { t.transport().abort(reason); })
        .def("close", &PyTransport::close, py::call_guard<py::gil_scoped_release>());
}

}  // namespace moecore::bindings
