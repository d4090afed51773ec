// The plan of one mlp_adapt call: the form of each layer by a cost model, and where everything lies.
#pragma once

#include <vector>

#include "core/mlp_adapt_plan.h"

namespace mtml {

struct OwnedPlan {
  MlpPlan plan{};
  std::vector<MlpLayer> layers;
  std::vector<Place> places;
  int64_t num_elements = 0;
};

// What the plan depends on besides the options.
struct PlanRequest {
  MlpOptions options;
  std::vector<bool> moves, per_task, rate_by_element;  // of each parameter
  int64_t support_rows, query_rows;                    // of the largest task
  int64_t all_support_rows, all_query_rows;
  bool wants_fast, wants_rates, wants_support_x, wants_query_x;
  int64_t rate_rows;  // of rates by element: 1 or K; 0 where their gradient is not wanted
  int64_t element_bytes;
  int64_t lanes, panel;
  int64_t (*packed_size)(int64_t k, int64_t n);
};

OwnedPlan make_plan(const PlanRequest& request);

}  // namespace mtml
