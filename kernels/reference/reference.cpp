#include "kernels/reference/reference.h"

namespace thinkv::kernels {

const KernelSet& reference() {
  static constexpr KernelSet kSet = {
      .name = "reference",
      .rotate = ref::rotate,
      .rotate_back = ref::rotate_back,
      .encode = ref::encode,
      .encode_block = ref::encode_block,
      .decode = ref::decode,
      .attend = ref::attend,
      .medoids = ref::medoids,
  };
  return kSet;
}

}  // namespace thinkv::kernels
