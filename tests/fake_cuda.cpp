// What a build of torch without CUDA lacks to trace graphs with fake CUDA tensors.

#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

// A device guard that does nothing.
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)

namespace at::native {

// The kernel that scaled_dot_product_attention chooses on a Hopper: cuDNN (3) for half precision, flash (1) where cuDNN
// declines, else the efficient one (2), else plain arithmetic (0).
static int64_t choose(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                      double, bool, std::optional<double>, bool) {
  const bool half = query.scalar_type() == at::kHalf || query.scalar_type() == at::kBFloat16;
  const int64_t size = query.size(-1), value_size = value.size(-1), keys = key.size(-2);
  if (half && size % 8 == 0 && value_size % 8 == 0 && size <= 128 && value_size <= 128 && keys != 1) {
    return 3;
  }
  if (half && !mask && size == value_size && size <= 256) {
    return 1;
  }
  const int64_t unit = half ? 8 : 4;
  return size % unit == 0 && value_size % unit == 0 ? 2 : 0;
}

REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &choose)

}  // namespace at::native
