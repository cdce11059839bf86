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
        run(activations, batch, out);
    }

    /// A pass of one token of each of S sequences, all of which want logits. numbers: 3 S + S B
    /// int32, which are token_ids, positions, context_lens and block_tables of forward, side by
    /// side. For the many passes that are little else: each tensor of Python's has its price.
    void forward_decodes(PyActivations& activations, const py::bytes& numbers,
                         int64_t num_sequences, py::handle cos_sin, py::handle logits) {
        const TensorArg table(cos_sin, kOp, "cos_sin");
        const TensorArg out(logits, kOp, "logits");
        constexpr int64_t kBytes = sizeof(int32_t);
        const auto num_bytes = static_cast<int64_t>(PyBytes_GET_SIZE(numbers.ptr()));
        require(num_sequences >= 1 && num_bytes > 3 * kBytes * num_sequences &&
                    num_bytes % (kBytes * num_sequences) == 0,
                kOp, ": numbers must be int32, 4 or more for each of the ", num_sequences,
                " sequences, got ", num_bytes, " bytes");
        const int64_t width = num_bytes / (kBytes * num_sequences) - 3;
        auto* first = reinterpret_cast<int32_t*>(PyBytes_AS_STRING(numbers.ptr()));  // only read
        for (auto next = static_cast<int32_t>(counting_.size()); next <= num_sequences; ++next)
            counting_.push_back(next);
        const auto part = [&](int64_t i) {
            return TensorView(first + i * num_sequences, DType::kInt32, {num_sequences}, Device{});
        };
        const TensorView offsets(counting_.data(), DType::kInt32, {num_sequences + 1}, Device{});
        const TensorView rows(counting_.data(), DType::kInt32, {num_sequences}, Device{});
        const TensorView tables(first + 3 * num_sequences, DType::kInt32, {num_sequences, width},
                                Device{});
        run(activations,
            {.token_ids = part(0),
             .positions = part(1),
             .cos_sin = table,
             .sequences = {offsets, part(2), tables},
             .logit_rows = rows},
            out);
    }

private:
    static constexpr const char* kOp = "Decoder";

    void run(PyActivations& activations, const DecoderBatch& batch,
             const TensorView& logits) const {
        activations.run([&](const Activations& a, Workspace& workspace, Stream stream) {
            workspace.grow(decoder_.workspace_bytes(a.num_tokens()));
            decoder_.forward(batch, a, workspace, logits, stream);
        });
    }

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
    std::vector<int32_t> counting_;  ///< 0, 1, 2, ...
};

}  // namespace

void bind_decoder(py::module_& module) {
    py::class_<PyDecoder>(module, "Decoder")
        .def(py::init<std::vector<py::object>, py::list, py::list, py::dict>(), py::kw_only(),
             py::arg("layers"), py::arg("key_caches"), py::arg("value_caches"), py::arg("weights"))
        .def("forward", &PyDecoder::forward)
        .def("forward_decodes", &PyDecoder::forward_decodes);
}

}  // namespace moecore::bindings
