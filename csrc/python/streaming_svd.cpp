// SPDX-License-Identifier: Apache-2.0
#include "structmat/streaming_svd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <set>

#include "arrays.h"
#include "bindings.h"
#include "structmat/error.h"

namespace py = pybind11;

namespace structmat::python {
namespace {

using Int64s = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

std::string tuple_of(std::int64_t rows, std::int64_t cols) {
  return "(" + std::to_string(rows) + ", " + std::to_string(cols) + ")";
}

// structmat.linalg.StreamingSVD on arrays. A lock keeps threads of Python apart; it is taken and
// held without the GIL only, so that no thread with the one waits for a thread with the other.
class StreamingSvd {
 public:
  StreamingSvd(std::int64_t n, std::int64_t rank, double decay, bool center, const py::object& seed,
               const py::object& dtype, int threads)
      : seed_(seed_of(seed, "StreamingSVD")),
        shape_(named("StreamingSVD", [&] { return streaming_svd_shape(n, rank); })),
        dtype_(dtype_of_array(py::dtype::from_args(dtype), "StreamingSVD", "dtype")) {
    if (!(decay > 0 && decay <= 1))
      throw py::value_error("StreamingSVD: decay is " + std::to_string(decay) +
                            ", wanted more than 0 and at most 1");
    context_.threads = threads;
    state_.rank = rank;
    state_.decay = decay;
    state_.center = center;
    buffer_.resize(static_cast<std::size_t>(shape_.chunk * n) * size_of(dtype_));
    parts_ = Parts(shape_.keep, n);
    state_.buffer = {buffer_.data(), dtype_, shape_.chunk, n, n};
    show(state_, parts_);
  }
  StreamingSvd(const StreamingSvd&) = delete;
  StreamingSvd& operator=(const StreamingSvd&) = delete;

  void update(const py::object& rows) {
    const std::string op = "StreamingSVD.update";
    if (py::hasattr(rows, "indptr") && py::hasattr(rows, "indices") && py::hasattr(rows, "data"))
      return update_csr(rows, op);
    py::object matrix = rows;
    if (py::isinstance<py::array>(rows) && rows.attr("ndim").cast<int>() == 1)
      matrix = rows.attr("reshape")(1, -1);
    const Matrix m(matrix, op, "rows");
    check_rows(op, m.view.dtype, m.view.rows, m.view.cols);
    const py::gil_scoped_release release;
    const std::lock_guard lock(mutex_);
    check_finite(op, m.view);
    named(op, [&] { streaming_svd_update(context_, state_, m.view); });
  }

  void merge(const StreamingSvd& other) {
    const std::string op = "StreamingSVD.merge";
    if (other.dtype_ != dtype_)
      throw py::type_error(op + ": other has dtype " + name_of(other.dtype_) + ", wanted " +
                           name_of(dtype_));
    const StreamingSvdState& theirs = other.state_;
    const auto same = [&](const char* name, auto found, auto wanted) {
      if (found != wanted)
        throw py::value_error(op + ": other has " + name + " " +
                              py::str(py::cast(found)).cast<std::string>() + ", wanted " +
                              py::str(py::cast(wanted)).cast<std::string>());
    };
    same("n_features", theirs.buffer.cols, state_.buffer.cols);
    same("rank", theirs.rank, state_.rank);
    same("decay", theirs.decay, state_.decay);
    same("center", theirs.center, state_.center);
    same("seed", other.seed_, seed_);
    const py::gil_scoped_release release;
    std::vector<unsigned char> buffer;
    Parts parts;
    StreamingSvdState copy;
    {
      const std::lock_guard lock(other.mutex_);
      buffer = other.buffer_;
      parts = other.parts_;
      copy = theirs;
    }
    copy.buffer.data = buffer.data();
    show(copy, parts);
    const std::lock_guard lock(mutex_);
    named(op, [&] { streaming_svd_merge(context_, state_, copy); });
  }

  py::tuple result() const {
    const std::string op = "StreamingSVD.result";
    py::array s, vh;
    const DType dtype = result_dtype(dtype_);
    const VectorView s_view = new_vector(s, dtype, state_.rank);
    const MatrixView vh_view = new_matrix(vh, dtype, state_.rank, state_.buffer.cols);
    SvdInfo info{};
    {
      const py::gil_scoped_release release;
      const std::lock_guard lock(mutex_);
      require_rows(op);
      Parts parts = parts_;
      named(op,
            [&] { streaming_svd_result(context_, folded(parts), seed_, s_view, vh_view, &info); });
    }
    return py::make_tuple(s, vh, facts_of(info));
  }

  py::array mean() const {
    const std::string op = "StreamingSVD.mean";
    Parts parts;
    {
      const py::gil_scoped_release release;
      const std::lock_guard lock(mutex_);
      require_rows(op);
      parts = parts_;
      named(op, [&] { folded(parts); });
    }
    return py::array_t<double>(static_cast<py::ssize_t>(parts.mean.size()), parts.mean.data())
        .attr("astype")(numpy_dtype(result_dtype(dtype_)));
  }

  py::dict state_dict() const {
    const std::int64_t n = state_.buffer.cols;
    std::vector<unsigned char> rows;
    Parts parts;
    std::int64_t seen = 0, buffered = 0;
    {
      const py::gil_scoped_release release;
      const std::lock_guard lock(mutex_);
      seen = state_.rows;
      buffered = state_.buffered;
      rows.assign(buffer_.begin(),
                  buffer_.begin() + buffered * n * static_cast<std::int64_t>(size_of(dtype_)));
      parts = parts_;
    }
    py::array buffer;
    const MatrixView to = new_matrix(buffer, dtype_, buffered, n);
    if (buffered > 0) std::memcpy(to.data, rows.data(), rows.size());
    const auto wide = [](const std::vector<double>& from, std::vector<std::int64_t> shape) {
      return py::array_t<double>(std::move(shape), from.data());
    };
    const py::object scalar = py::module_::import("numpy").attr("array");
    py::dict state;
    state["buffer"] = buffer;
    state["factor"] = wide(parts.factor, {shape_.keep, n});
    state["mean"] = wide(parts.mean, {n});
    state["facts"] = wide(parts.facts, {2});
    state["n_features"] = scalar(n);
    state["rank"] = scalar(state_.rank);
    state["decay"] = scalar(state_.decay);
    state["center"] = scalar(state_.center);
    state["seed"] = scalar(static_cast<std::int64_t>(seed_));
    state["rows_seen"] = scalar(seen);
    return state;
  }

  void load_state_dict(const py::object& mapping) {
    const std::string op = "StreamingSVD.load_state_dict";
    if (!py::hasattr(mapping, "keys") || !py::hasattr(mapping, "__getitem__"))
      throw py::type_error(op + ": state must be a mapping, got " + type_name(mapping));
    const py::dict state(mapping);
    check_names(op, state);
    const auto number = [&](const char* name) {
      const py::array value = py::array::ensure(state[name]);
      if (!value || value.size() != 1)
        throw py::value_error(op + ": " + name + " is no single number");
      return py::object(value.attr("item")());
    };
    const auto same = [&](const char* name, const py::object& wanted) {
      const py::object found = number(name);
      if (!found.equal(wanted))
        throw py::value_error(op + ": the state has " + name + " " +
                              py::str(found).cast<std::string>() + ", wanted " +
                              py::str(wanted).cast<std::string>());
    };
    const std::int64_t n = state_.buffer.cols;
    same("n_features", py::int_(n));
    same("rank", py::int_(state_.rank));
    same("decay", py::float_(state_.decay));
    same("center", py::bool_(state_.center));
    same("seed", py::int_(seed_));
    const py::object seen = number("rows_seen");
    const std::int64_t rows = natural(seen, op, "rows_seen");

    Parts parts(shape_.keep, n);
    const auto read = [&](const char* name, DType dtype, std::int64_t height, std::int64_t width,
                          void* to) {
      const py::array a = array_of(op, state, name, dtype);
      const std::int64_t found = a.ndim() == 2 ? a.shape(0) : 1;
      if (a.ndim() != (height == 0 ? 1 : 2) || a.shape(a.ndim() - 1) != width ||
          (height > 0 && found != height))
        throw py::value_error(
            op + ": " + name + " has another shape than " +
            (height == 0 ? "(" + std::to_string(width) + ",)" : tuple_of(height, width)));
      const auto size = static_cast<std::int64_t>(size_of(dtype));
      check_finite(op + ": " + name, {a.data(), dtype, found, width, width, 1}, true);
      std::memcpy(to, a.data(), static_cast<std::size_t>(found * width * size));
    };
    read("factor", DType::f64, shape_.keep, n, parts.factor.data());
    read("mean", DType::f64, 0, n, parts.mean.data());
    read("facts", DType::f64, 0, 2, parts.facts.data());
    if (parts.facts[0] < 0 || parts.facts[1] < 0 || (parts.facts[1] > 0 && dtype_ != DType::f64))
      throw py::value_error(op + ": facts are such as no rows lead to");
    const py::array first = array_of(op, state, "buffer", dtype_);
    const std::int64_t buffered = first.ndim() == 2 ? first.shape(0) : -1;
    if (buffered < 0 || first.shape(1) != n)
      throw py::value_error(op + ": buffer has another shape than (b, " + std::to_string(n) + ")");
    if (buffered >= shape_.chunk || buffered > rows)
      throw py::value_error(op + ": " + std::to_string(buffered) + " rows of " +
                            std::to_string(rows) + " are in the buffer, wanted fewer");
    std::vector<unsigned char> buffer(buffer_.size());
    if (buffered > 0) read("buffer", dtype_, buffered, n, buffer.data());
    const py::gil_scoped_release release;
    const std::lock_guard lock(mutex_);
    buffer_ = std::move(buffer);
    parts_ = std::move(parts);
    state_.buffer.data = buffer_.data();
    show(state_, parts_);
    state_.rows = rows;
    state_.buffered = buffered;
  }

  std::int64_t n_features() const { return state_.buffer.cols; }
  std::int64_t rank() const { return state_.rank; }
  double decay() const { return state_.decay; }
  bool center() const { return state_.center; }
  std::uint64_t seed() const { return seed_; }
  py::dtype dtype() const { return numpy_dtype(dtype_); }
  std::int64_t rows_seen() const {
    const py::gil_scoped_release release;
    const std::lock_guard lock(mutex_);
    return state_.rows;
  }

 private:
  struct Parts {
    std::vector<double> factor, mean, facts;
    Parts() = default;
    Parts(std::int64_t keep, std::int64_t n)
        : factor(static_cast<std::size_t>(keep * n)), mean(static_cast<std::size_t>(n)), facts(2) {
      shape = {keep, n};
    }
    std::pair<std::int64_t, std::int64_t> shape;
  };

  static void show(StreamingSvdState& state, Parts& parts) {
    const auto [keep, n] = parts.shape;
    state.factor = {parts.factor.data(), DType::f64, keep, n, n};
    state.mean = {parts.mean.data(), DType::f64, n};
    state.facts = {parts.facts.data(), DType::f64, 2};
  }

  // The state with nothing buffered, in `parts`: asking for a result changes no later one.
  StreamingSvdState folded(Parts& parts) const {
    StreamingSvdState copy = state_;
    show(copy, parts);
    streaming_svd_fold(context_, copy);
    return copy;
  }

  // Under the lock.
  void require_rows(const std::string& op) const {
    if (state_.rows == 0) throw Error(op + ": no rows were seen yet");
  }

  void check_rows(const std::string& op, DType dtype, std::int64_t rows, std::int64_t cols) const {
    if (dtype != dtype_)
      throw py::type_error(op + ": rows are " + name_of(dtype) + ", wanted " + name_of(dtype_));
    const std::int64_t n = state_.buffer.cols;
    if (cols != n)
      throw py::value_error(op + ": rows have shape " + tuple_of(rows, cols) + ", wanted (b, " +
                            std::to_string(n) + ") or (" + std::to_string(n) + ",)");
  }

  void check_finite(const std::string& op, const StridedMatrixView& values,
                    bool argument = false) const {
    double finite = 1;
    streaming_svd_check(context_, values, &finite);
    if (finite != 0) return;
    if (argument) throw Error(op + " contains NaN or Inf");
    throw LinAlgError(op + ": rows contain NaN or Inf");
  }

  void update_csr(const py::object& rows, const std::string& op) {
    if (!py::hasattr(rows, "format") || !py::object(rows.attr("format")).equal(py::str("csr")))
      throw py::type_error(op + ": sparse rows must be in CSR format; see tocsr()");
    const py::tuple shape(rows.attr("shape"));
    if (shape.size() != 2)
      throw py::value_error(op + ": rows must have 2 dimensions, got " +
                            std::to_string(shape.size()));
    const Int64s starts = indices_of(rows, "indptr", op), columns = indices_of(rows, "indices", op);
    const py::array data = py::array::ensure(rows.attr("data"));
    if (!data || starts.ndim() != 1 || columns.ndim() != 1 || data.ndim() != 1 || starts.size() < 1)
      throw py::value_error(op + ": the parts of CSR rows must be vectors");
    const DType dtype = dtype_of_array(data.dtype(), op, "rows");
    const std::int64_t count = starts.size() - 1;
    check_rows(op, dtype, count, natural(shape[1], op, "the width of rows"));
    const py::array values = py::module_::import("numpy").attr("ascontiguousarray")(readable(data));
    const std::int64_t* const start = starts.data();
    const std::int64_t* const column = columns.data();
    const std::int64_t n = state_.buffer.cols;
    bool valid = start[0] == 0 && start[count] <= std::min(columns.size(), values.size());
    for (std::int64_t i = 0; i < count && valid; ++i) valid = start[i] <= start[i + 1];
    for (std::int64_t i = 0; i < count && valid; ++i)
      for (std::int64_t k = start[i]; k < start[i + 1]; ++k)
        valid &= column[k] >= (k > start[i] ? column[k - 1] + 1 : 0) && column[k] < n;
    if (!valid)
      throw py::value_error(op +
                            ": rows are no CSR matrix with ascending columns in each row; see "
                            "sum_duplicates()");
    const CsrView view{start, column, values.data(), dtype, count};
    const std::int64_t stored = start[count];
    const py::gil_scoped_release release;
    const std::lock_guard lock(mutex_);
    check_finite(op, {view.values, dtype, 1, stored, stored, 1});
    named(op, [&] { streaming_svd_update(context_, state_, view); });
  }

  static Int64s indices_of(const py::object& rows, const char* name, const std::string& op) {
    const py::array found = py::array::ensure(rows.attr(name));
    const char kind = found ? found.dtype().kind() : 'O';
    if (kind != 'i' && kind != 'u')
      throw py::type_error(op + ": " + name + " of CSR rows must be integers" +
                           (found ? ", got " + py::str(found.dtype()).cast<std::string>() : ""));
    return Int64s(found);
  }

  static void check_names(const std::string& op, const py::dict& state) {
    const std::set<std::string> wanted = {"buffer", "factor", "mean",   "facts", "n_features",
                                          "rank",   "decay",  "center", "seed",  "rows_seen"};
    std::set<std::string> found;
    for (const auto& item : state) found.insert(py::str(item.first).cast<std::string>());
    if (found == wanted) return;
    std::string message = op + ": wanted the names";
    for (const std::string& name : wanted) message += " " + name;
    message += ", got";
    for (const std::string& name : found) message += " " + name;
    throw py::value_error(message);
  }

  static py::array array_of(const std::string& op, const py::dict& state, const char* name,
                            DType dtype) {
    if (!py::isinstance<py::array>(state[name]))
      throw py::type_error(op + ": " + name + " must be an array");
    const py::array a = state[name].cast<py::array>();
    if (dtype_of_array(a.dtype(), op, name) != dtype)
      throw py::type_error(op + ": " + name + " has dtype " +
                           py::str(a.dtype()).cast<std::string>() + ", wanted " + name_of(dtype));
    return py::module_::import("numpy").attr("ascontiguousarray")(readable(a));
  }

  Context context_;
  const std::uint64_t seed_;
  const StreamingSvdShape shape_;
  const DType dtype_;
  std::vector<unsigned char> buffer_;
  Parts parts_;
  StreamingSvdState state_;
  mutable std::mutex mutex_;
};

}  // namespace

void register_streaming_svd(py::module_& m) {
  py::class_<StreamingSvd>(m, "StreamingSVD", "structmat.linalg.StreamingSVD on NumPy arrays.")
      .def(py::init<std::int64_t, std::int64_t, double, bool, const py::object&, const py::object&,
                    int>(),
           py::arg("n_features"), py::arg("rank"), py::kw_only(), py::arg("decay") = 1.0,
           py::arg("center") = false, py::arg("seed") = 0,
           py::arg("dtype") = py::dtype::of<float>(), py::arg("threads") = 0)
      .def(
          "update",
          [](py::object self, const py::object& rows) {
            self.cast<StreamingSvd&>().update(rows);
            return self;
          },
          py::arg("rows"), "Appends rows (b, n) or (n,), or a SciPy CSR matrix of them.")
      .def(
          "merge",
          [](py::object self, const StreamingSvd& other) {
            self.cast<StreamingSvd&>().merge(other);
            return self;
          },
          py::arg("other"), "Appends all rows that another object has seen.")
      .def("result", &StreamingSvd::result, "S, Vh and a dict of facts, of all rows so far.")
      .def("state_dict", &StreamingSvd::state_dict, "A copy of the state, arrays only.")
      .def(
          "load_state_dict",
          [](py::object self, const py::object& state) {
            self.cast<StreamingSvd&>().load_state_dict(state);
            return self;
          },
          py::arg("state"), "Takes over a state from state_dict().")
      .def_property_readonly("mean", &StreamingSvd::mean)
      .def_property_readonly("n_features", &StreamingSvd::n_features)
      .def_property_readonly("rank", &StreamingSvd::rank)
      .def_property_readonly("decay", &StreamingSvd::decay)
      .def_property_readonly("center", &StreamingSvd::center)
      .def_property_readonly("seed", &StreamingSvd::seed)
      .def_property_readonly("dtype", &StreamingSvd::dtype)
      .def_property_readonly("rows_seen", &StreamingSvd::rows_seen);
}

}  // namespace structmat::python
