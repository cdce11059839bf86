#include "moecore/decoder.hpp"

#include <pybind11/stl.h>

#include <memory>

#include "bindings/decoder_layer.hpp"

namespace py = pybind11;

namespace moecore::bindings {
namespace {

/// A Decoder with references to its layers, caches and weights.
class PyDecoder {
public:
    PyDecoder(std::vector<py::object> layers, py::list key_caches, py::list value_caches,
              py::dict weights)
        : layers_(std::move(layers)),
          weights_(kOp, std::move(weights)),
          decoder_(parts(key_caches, value_caches)) {}

    void forward(PyActivations& activations, py::handle token_ids, py::handle positions,
                 py::handle cos_sin, py::handle query_offsets, py::handle context_lens,
                 py::handle block_tables, py::handle logit_rows, py::handle logits) const {
        const TensorArg ids(token_ids, kOp, "token_ids");
        const TensorArg places(positions, kOp, "positions");
        const TensorArg table(cos_sin, kOp, "cos_sin");
        const TensorArg offsets(query_offsets, kOp, "query_offsets");
        const TensorArg lens(context_lens, kOp, "context_lens");
        const TensorArg tables(block_tables, kOp, "block_tables");
        const TensorArg rows(logit_rows, kOp, "logit_rows");
        const TensorArg out(logits, kOp, "logits");
        const DecoderBatch batch{.token_ids = ids,
                                 .positions = places,
                                 .cos_sin = table,
                                 .sequences = {offsets, lens, tables},
                                 .logit_rows = rows};
        activations.run([&](const Activations& a, Workspace& workspace, Stream stream) {
            workspace.grow(decoder_.workspace_bytes(a.num_tokens()));
            decoder_.forward(batch, a, workspace, out, stream);
        });
    }

private:
    static constexpr const char* kOp = "Decoder";

    DecoderParts parts(py::list key_caches, py::list value_caches) {
        DecoderParts parts;
        for (const py::object& layer : layers_) {
            if (!py::isinstance<PyDecoderLayer>(layer))
                throw py::type_error(concat(kOp, ": layers must be DecoderLayers, got ",
                                            Py_TYPE(layer.ptr())->tp_name));
            parts.layers.push_back(&layer.cast<const PyDecoderLayer&>().layer());
        }
        if (key_caches.size() != value_caches.size())
            throw InvalidArgument(concat(kOp, ": value_caches must be as many as key_caches, ",
                                         key_caches.size(), ", got ", value_caches.size()));
        for (size_t i = 0; i < key_caches.size(); ++i)
            parts.caches.push_back(
                {cache("key_caches", key_caches[i]), cache("value_caches", value_caches[i])});
        parts.embedding = weights_.weights("embedding");
        parts.final_norm = weights_.tensor("final_norm");
        parts.head = weights_.weights("head");
        return parts;
    }

    TensorView cache(const char* name, py::object tensor) {
        return cache_args_.emplace_back(caches_.emplace_back(std::move(tensor)), kOp, name).view();
    }

    std::vector<py::object> layers_;
    std::deque<py::object> caches_;
    std::deque<TensorArg> cache_args_;
    NamedTensors weights_;
    Decoder decoder_;
};

}  // namespace

void bind_decoder(py::module_& module) {
    py::class_<PyDecoder>(module, "Decoder")
        .def(py::init<std::vector<py::object>, py::list, py::list, py::dict>(), py::kw_only(),
             py::arg("layers"), py::arg("key_caches"), py::arg("value_caches"), py::arg("weights"))
        .def("forward", &PyDecoder::forward);
}

}  // namespace moecore::bindings
