// All of Longspan.
#pragma once

#include "longspan/eigen.hpp"
#include "longspan/element.hpp"
#include "longspan/error.hpp"
#include "longspan/execution.hpp"
#include "longspan/key_ranges.hpp"
#include "longspan/mask.hpp"
#include "longspan/partial.hpp"
#include "longspan/position.hpp"
#include "longspan/reference/partial.hpp"
#include "longspan/reference/position.hpp"
#include "longspan/reference/softmax_attention.hpp"
#include "longspan/score.hpp"
#include "longspan/softmax_attention.hpp"
#include "longspan/version.hpp"
#include "longspan/view.hpp"
