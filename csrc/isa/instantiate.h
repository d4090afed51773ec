// The whole core, compiled for the set that the including file names by MTML_ISA and MTML_VECTOR_BYTES.
#include "core/gradient_combine.h"
#include "core/gradient_gram.h"
#include "core/heads.h"
#include "core/heads_loss.h"
#include "core/mlp_adapt.h"
#include "core/sgd_step.h"

#define MTML_STRING_(text) #text
#define MTML_STRING(text) MTML_STRING_(text)

namespace mtml::MTML_ISA {

const Kernels kernels = {
    MTML_STRING(MTML_ISA),
    {sgd_step<float>, sgd_step_backward<float>, sgd_step_shared_rate_backward<float>},
    {sgd_step<double>, sgd_step_backward<double>, sgd_step_shared_rate_backward<double>},
    kMlpAdapt<float>,
    kMlpAdapt<double>,
    {heads_scratch<float>, heads_forward<float>, heads_backward<float>, heads_double_backward<float>,
     heads_loss<float>},
    {heads_scratch<double>, heads_forward<double>, heads_backward<double>, heads_double_backward<double>,
     heads_loss<double>},
    {gradient_gram_scratch, gradient_gram_backward_scratch, gradient_gram<float>, gradient_gram_backward<float>,
     gradient_combine<float>, gradient_combine_backward<float>},
    {gradient_gram_scratch, gradient_gram_backward_scratch, gradient_gram<double>, gradient_gram_backward<double>,
     gradient_combine<double>, gradient_combine_backward<double>},
};

}  // namespace mtml::MTML_ISA
